"""Reads the files of a conversion.  Nothing else is opened, and no network connection."""

from __future__ import annotations

import glob
import os
import re

from netproxy.typed import NamedTuple

SIZE_LIMIT = 4 << 20
"""Bytes of a file: lists of a million names belong in a file of their own, which rules can name."""


class ConversionError(Exception):
    """Nothing can be converted, in words."""


class Source(NamedTuple):
    """What is converted: a file, or a command line."""

    path: str
    """As it was given; "" for a command line."""
    text: str
    """The content of the file; the words of a command line with blanks between them."""
    words: tuple[str, ...] = ()
    """The words of a command line."""

    @property
    def name(self) -> str:
        """The name that notes begin with."""
        return os.path.basename(self.path) or self.path or "command line"

    def resolve(self, path: str) -> str:
        """Return a path that the file names, relative to the folder of the file."""
        return os.path.join(os.path.dirname(self.path), path)

    def included(self, pattern: str) -> list[Source]:
        """Return the files of a pattern, sorted.  Raises ConversionError if one is unreadable."""
        path = self.resolve(pattern)
        paths = sorted(glob.glob(path)) if glob.has_magic(path) else [path]
        return [read_source(path) for path in paths]


def read_source(path: str) -> Source:
    """Read a file; "-" is standard input.  Raises ConversionError."""
    try:
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
            data = file.read(SIZE_LIMIT + 1)
    except OSError as error:
        # It may be the URL of a proxy, behind the name of a variable.
        shown = re.sub(r"://[^@]*@", "://***@", path)
        raise ConversionError(f"{shown}: {error.strerror or 'cannot be read'}") from error
    if len(data) > SIZE_LIMIT:
        raise ConversionError(f"{path}: is longer than {SIZE_LIMIT >> 20} MiB")
    if b"\0" in data:
        raise ConversionError(f"{path}: is not a text")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        # Old files are often in another encoding, in their comments at least.
        text = data.decode("latin-1")
    return Source("standard input" if path == "-" else path, text)
