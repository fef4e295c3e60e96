"""The options of a command of goproxy.

An option of one letter means another thing with one hyphen than with two: -C names a file, --C is
a switch.  So names keep their hyphens.
"""

from __future__ import annotations

import base64
import binascii
import re

from netproxy.ctl.convert.source import ConversionError
from netproxy.typed import TYPE_CHECKING, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.ctl.convert.command_lines.commands import Word
    from netproxy.ctl.convert.notes import Directive, Notes
    from netproxy.ctl.convert.source import Source

_SWITCHES = {
    *("--always", "--daemon", "--forever", "--nolog", "--debug", "--warn", "-m", "-M", "-B"),
    *("--bind-listen", "--udp", "--c", "--C", "--lock-port", "--p2p", "--redir", "--ssudp"),
    *("--disable-http", "--disable-socks", "--disable-ss", "--udp-compat", "--sniff-domain"),
    *("--lb-hashtarget", "--lb-onlyha", "--auth-nouser", "--parent-tls-single"),
    *("--local-tls-single", "--kcp-nocomp", "--kcp-acknodelay", "--help"),
}
"""Options without a value."""
_LONG = re.compile(r"--?([A-Za-z0-9][A-Za-z0-9-]+)(?:=(.*))?\Z", re.DOTALL)
_SHORT = re.compile(r"(--?[A-Za-z])=?(.*)\Z", re.DOTALL)
_SECRETS = ("-a", "-A", "-z", "-Z", "-D", "-j", "--kcp-key", "--auth-url")
_WITH_LOGIN = ("-P", "-J", "--jumper", "-u")
# A login within a URL, or in front of an address.
_LOGIN = re.compile(r"(?<=//)[^/@\s]*@|^[^/@\s]*:[^/@\s]*@(?=[^@]*:\d)")


class Option(NamedTuple):
    """A value of an option, and its directive."""

    value: str
    directive: Directive


class Options:
    """The options of one command, by their names with the hyphens."""

    def __init__(self, words: Sequence[Word], source: Source, notes: Notes) -> None:
        self.command = words[0].text.lower()
        self.source, self._notes = source, notes
        self.directive = notes.directive(source.name, words[0].line, self.command)
        self._options: dict[str, list[Option]] = {}
        place = 1
        while place < len(words):
            place = self._read(words, place)

    def _read(self, words: Sequence[Word], place: int) -> int:
        """Read an option; return the place of the next one."""
        word = words[place]
        name, value = _split(word.text)
        if not name:
            directive = self._notes.directive(self.source.name, word.line, word.text)
            self._notes.lost(directive, "is neither an option nor its value")
            return place + 1
        place += 1
        if value is None and name not in _SWITCHES:
            value = words[place].text if place < len(words) else ""
            place += 1
        shown = _shown(name, value or "")
        directive = self._notes.directive(self.source.name, word.line, f"{name} {shown}".rstrip())
        self._options.setdefault(name, []).append(Option(value or "", directive))
        return place

    def texts(self, *names: str) -> list[str]:
        """Return all values of options, which are carried."""
        options = [option for name in names for option in self._options.get(name, ())]
        for option in options:
            if not self._notes.is_noted(option.directive):
                self._notes.carried(option.directive)
        return [option.value for option in options]

    def text(self, *names: str) -> str:
        """Return the last value of an option, which is carried; "" if it is not given."""
        texts = self.texts(*names)
        return texts[-1].strip() if texts else ""

    def flag(self, *names: str) -> bool:
        """Return whether a switch is given; it is carried."""
        return bool(self.texts(*names))

    def number(self, *names: str) -> int:
        """Return the number of an option, which is carried; 0 if it is none."""
        text = self.text(*names)
        return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else 0

    def has(self, *names: str) -> bool:
        """Return whether an option is given."""
        return any(name in self._options for name in names)

    def origins(self, *names: str) -> list[Directive]:
        """Return the directives of options."""
        return [option.directive for name in names for option in self._options.get(name, ())]

    def changed(self, name: str, why: str, advice: str = "") -> None:
        """Note a difference of an option."""
        for directive in self.origins(name):
            self._notes.changed(directive, why, advice)

    def lost(self, name: str, why: str, advice: str = "") -> None:
        """Note that an option is not carried."""
        for directive in self.origins(name):
            self._notes.lost(directive, why, advice)

    def unneeded(self, name: str, why: str) -> None:
        """Note that an option needs no setting."""
        for directive in self.origins(name):
            self._notes.unneeded(directive, why)

    def lose_all(self, why: str) -> None:
        """Note that no option is carried."""
        for name in self._options:
            self.lost(name, why)

    def rest(self) -> list[str]:
        """Return the names of options that nothing has noted."""
        noted = self._notes.is_noted
        return [
            name
            for name, options in self._options.items()
            if not all(noted(option.directive) for option in options)
        ]

    def elements(self, *names: str) -> list[str] | None:
        """Return the lines of the lists that options name; None if one cannot be read."""
        lines: list[str] = []
        for name in names:
            for text in self.texts(name):
                try:
                    lines += _list(text, self.source)
                except ConversionError as error:
                    self.lost(name, str(error))
                    return None
        return lines


def _shown(name: str, value: str) -> str:
    """Return a value without its secrets."""
    if name in _SECRETS or (name == "-J" and "://" not in value):
        return "***"
    return _LOGIN.sub("***@", value) if name in _WITH_LOGIN else value


def _split(text: str) -> tuple[str, str | None]:
    """Return the name of an option, and its value if it is in the same word."""
    if match := _LONG.match(text):
        is_long = text.startswith("--") or f"--{match[1]}" in _SWITCHES
        if is_long or match[1] in ("bind-ip", "udp-gc"):
            return f"--{match[1]}", match[2]
    if match := _SHORT.match(text):
        if text.startswith("--") and len(match[1]) + len(match[2]) < len(text) and not match[2]:
            return match[1], ""
        return match[1], match[2] or None
    return "", None


def _list(text: str, source: Source) -> list[str]:
    """Return the lines of a file, or of what stands in its place.  Raises ConversionError."""
    kind, separator, rest = text.partition("://")
    if separator and kind == "str":
        return [part.strip() for part in rest.split(",") if part.strip()]
    if separator and kind == "base64":
        try:
            content = base64.b64decode(rest, validate=True).decode()
        except (binascii.Error, ValueError):
            raise ConversionError("is not base64 of a text") from None
    else:
        content = "".join(f"{file.text}\n" for file in source.included(text))
    lines = (line.strip() for line in content.splitlines())
    return [line for line in lines if line and not line.startswith("#")]
