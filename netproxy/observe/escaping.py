"""Escapes characters that could deceive a reader of the log, of a terminal or of a page.

Names of users, hosts and agents come from strangers.  A control character moves the cursor, a
direction override (U+202E) reverses the text after it, and a zero-width character (U+200B)
makes two different names look the same.  Pure.
"""

from __future__ import annotations

import re

# Printable in the sense of str.isprintable(), but without a shape: the default ignorable
# characters of Unicode that are letters or marks, and the empty braille pattern.
_SHAPELESS = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\U000e0100-\U000e01ef]"
)


def escape(text: str) -> str:
    r"""Return `text` fit for one line: each deceiving character becomes \xNN, \uNNNN or \UNNNNNNNN.

    Deceiving are controls, line and paragraph separators, formatting characters (direction,
    zero width), surrogates, private and unassigned characters, and blanks other than a space.
    """
    if text.isascii():
        return text if text.isprintable() else "".join(map(_escape_character, text))
    if text.isprintable() and not _SHAPELESS.search(text):
        return text
    return "".join(map(_escape_character, text))


def _escape_character(character: str) -> str:
    if character.isprintable() and not _SHAPELESS.match(character):
        return character
    return character.encode("unicode_escape").decode()
