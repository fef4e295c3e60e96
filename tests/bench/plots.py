#!/usr/bin/env python3
"""Writes docs/PERFORMANCE.md and its plot from the medians that peers.py has kept.

python3 tests/bench/peers.py --json docs/performance.json
python3 tests/bench/plots.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Iterator, NamedTuple
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[2]
DATA, PAGE, PLOT = (
    ROOT / "docs" / name for name in ("performance.json", "PERFORMANCE.md", "performance.svg")
)
BAR, GAP, NAME, WIDTH, TITLE = 16, 4, 90, 360, 30
"""Pixels: of a bar, between bars, of names, of a panel, of its title."""


class Panel(NamedTuple):
    """One figure of all programs."""

    field: str
    title: str
    digits: int
    column: str


PANELS = (
    Panel("datagrams", "UDP: datagrams a second, single", 0, "UDP/s, single"),
    Panel("trains", "UDP: datagrams a second, trains of 8", 0, "UDP/s, trains"),
    Panel("bulk", "TCP: Gbit/s of one connection", 1, "Gbit/s"),
    Panel("connections", "connections a second, one by one", 0, "connections/s"),
    Panel("connection_us", "processor time of a connection, µs", 0, "µs each"),
    Panel("idle_mib", "memory with 200 idle connections, MiB", 1, "MiB"),
)


def panel(item: Panel, medians: dict[str, dict[str, float]], x: int, y: int) -> Iterator[str]:
    """Yield the elements of a panel at a position."""
    values = {name: figures[item.field] for name, figures in medians.items()}
    most = max(values.values())
    yield f'<text x="{x}" y="{y + 14}" font-weight="bold">{escape(item.title)}</text>'
    room = WIDTH - NAME - 70
    for number, (name, value) in enumerate(values.items()):
        top = y + TITLE + number * (BAR + GAP)
        colour = "#1565c0" if name == "netproxyd" else "#9e9e9e"
        length = max(1, round(room * value / most)) if value else 0
        text = f"{value:,.{item.digits}f}" if value else "no UDP"
        yield f'<text x="{x}" y="{top + 12}">{escape(name)}</text>'
        yield f'<rect x="{x + NAME}" y="{top}" width="{length}" height="{BAR}" fill="{colour}"/>'
        yield f'<text x="{x + NAME + length + 5}" y="{top + 12}">{text}</text>'


def plot(medians: dict[str, dict[str, float]]) -> str:
    """Return the plot as SVG: two columns of panels."""
    height = TITLE + len(medians) * (BAR + GAP) + 20
    elements = [
        element
        for number, item in enumerate(PANELS)
        for element in panel(item, medians, 10 + number % 2 * WIDTH, 10 + number // 2 * height)
    ]
    size = f'width="{2 * WIDTH + 10}" height="{len(PANELS) // 2 * height + 10}"'
    body = "\n".join(elements)
    style = 'font-family="sans-serif" font-size="12"'
    back = '<rect width="100%" height="100%" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n{back}\n{body}\n</svg>\n'


def page(content: dict[str, Any]) -> str:
    """Return the page."""
    medians = content["medians"]
    columns = " | ".join(item.column for item in PANELS)
    lines = [f"| | {columns} |", "|---" * (len(PANELS) + 1) + "|"]
    for name, figures in medians.items():
        values = ((figures[item.field], item.digits) for item in PANELS)
        shown = (f"{value:,.{digits}f}" if value else "-" for value, digits in values)
        lines.append(f"| {name} | {' | '.join(shown)} |")
    table = "\n".join(lines)
    return f"""# Performance

`tests/bench/plots.py` writes this page from `docs/performance.json`; do not edit it. To measure
again, on a machine that does nothing else:

    python3 tests/bench/peers.py --json docs/performance.json
    python3 tests/bench/plots.py

![Bars of the figures below](performance.svg)

{table}

Medians of {content["rounds"]} rounds of {content["seconds"]:g} s, {content["date"]}:
{content["machine"]}.
Load, proxy and targets share the processors on loopback, so compare programs, not figures of other
machines; one figure may differ by 30 %.

- UDP: 8 clients send datagrams of 1,200 bytes as fast as they can; what arrives at the targets
  counts. Trains are what browsers and QUIC libraries send (UDP_SEGMENT): NetProxy passes them on as
  they are.
- TCP: one connection, target to client. NetProxy lets the kernel move the bytes (splice).
- Connections: one client opens one after the other, with a byte to the target and back.
- Memory is that of all processes of a program; pages that they share count once.

One process of netproxyd ran. `workers` uses further processors ([WORKERS.md](WORKERS.md)).
`tests/bench/README.md` has more programs, and what each measures.
"""


def main() -> None:
    """Write the page and the plot."""
    content = json.loads(DATA.read_text())
    PLOT.write_text(plot(content["medians"]))
    PAGE.write_text(page(content))


if __name__ == "__main__":
    main()
