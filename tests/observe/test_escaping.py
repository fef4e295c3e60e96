"""Characters that could deceive a reader are escaped, all others are not."""

from __future__ import annotations

import pytest

from netproxy.observe.escaping import escape

CONTROLS = [*range(0x20), *range(0x7F, 0xA0)]
SEPARATORS = [0xA0, 0x1680, 0x2000, 0x202F, 0x2028, 0x2029, 0x3000]
DIRECTIONS = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
ZERO_WIDTH = [0xAD, 0x034F, 0x180E, 0x200B, 0x200C, 0x200D, 0x2060, 0x2064, 0xFE0F, 0xFEFF, 0xE0101]
EMPTY = [0x115F, 0x1160, 0x17B4, 0x2800, 0x3164, 0xFFA0, 0xE0041]
NO_CHARACTERS = [0xD800, 0xDFFF, 0xE000, 0xFFFE, 0x10FFFF]


@pytest.mark.parametrize(
    "code",
    [*CONTROLS, *SEPARATORS, *DIRECTIONS, *ZERO_WIDTH, *EMPTY, *NO_CHARACTERS],
    ids=lambda code: f"U+{code:04X}",
)
def test_deceiving_character_becomes_its_code_in_ascii(code: int) -> None:
    """Hazards 112 and 143."""
    escaped = escape(f"a{chr(code)}b")
    assert escaped.isascii() and escaped.isprintable()
    assert escaped[0] + escaped[-1] == "ab"
    assert escaped[1:-1].encode().decode("unicode_escape") == chr(code)


def test_direction_override_and_zero_width_space_are_shown_as_their_codes() -> None:
    """Hazard 143."""
    assert escape("ali\u200bce\u202egro.elpmaxe") == r"ali\u200bce\u202egro.elpmaxe"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "alice",
        "two words",
        'Zo\u00eb \u4e2d\u6587 \\ "',
        "\u05d0\u05d1",
        "e\u0301",
        "\U0001f600",
    ],
)
def test_printable_text_is_not_changed(text: str) -> None:
    assert escape(text) == text
