"""What netproxyctl why prints."""

from __future__ import annotations

from typing import Any

from netproxy.ctl.why import why_text

ROW: dict[str, Any] = {
    "id": "k4x2dy",
    "at": 1000.0,
    "outdated": False,
    "kind": "failed",
    "reason": "connection refused",
    "listener": "main",
    "client": "10.0.0.9:41000",
    "user": "alice",
    "network": "tcp",
    "asked": "192.0.2.9:443",
    "name": "a.example",
    "decided": "'office' (socks5://10.0.0.1:1080): connection refused",
    "rule": "rules[2]",
    "upstream": "pool/office",
    "hop": "'office' (socks5://10.0.0.1:1080)",
    "addresses": ["192.0.2.9"],
    "tried": [["10.0.0.1:1080", "connection refused"]],
    "seconds": 0.25,
    "place": "",
    "rule_place": "n.yaml:12:5",
    "advice": "is that proxy up?",
}


def text(*rows: dict[str, Any], number: int = 3, remembered: int = 7) -> str:
    answer: Any = {"incidents": list(rows), "remembered": remembered, "limit": 256}
    return why_text(answer, "x", number, 1060.0)


def test_failure_is_told_from_the_flow_to_what_to_do() -> None:
    head, *lines = text(ROW).splitlines()
    assert head.startswith("k4x2dy  failed, ") and head.endswith(", 1m ago")
    assert lines == [
        "  flow:     tcp alice@10.0.0.9:41000 -> 192.0.2.9:443 (a.example) on main",
        "  rule:     rules[2] (n.yaml:12:5), upstream pool/office",
        "  reason:   connection refused after 0.250 s",
        "  decided:  'office' (socks5://10.0.0.1:1080): connection refused",
        "  hop:      'office' (socks5://10.0.0.1:1080)",
        "  tried:    10.0.0.1:1080: connection refused",
        "  to do:    is that proxy up?",
    ]


def test_refusal_has_only_what_is_known() -> None:
    empty = dict.fromkeys(("user", "name", "rule", "upstream", "hop", "asked", "advice"), "")
    row = {**ROW, **empty, "kind": "refused", "tried": [], "addresses": [], "seconds": 0.0}
    row |= {"client": "", "decided": "clients", "place": "n.yaml:2:5", "outdated": True}
    assert text(row).splitlines()[1:] == [
        "  flow:     tcp ? -> (nothing yet) on main",
        "  reason:   connection refused",
        "  decided:  clients (n.yaml:2:5)",
        "  (the configuration has been read again since then)",
    ]


def test_newest_come_first_and_the_rest_is_counted() -> None:
    rows = [{**ROW, "id": f"id{number}"} for number in range(5)]
    paragraphs = text(*rows, number=2).split("\n\n")
    assert [paragraph[:3] for paragraph in paragraphs] == ["id4", "id3", "3 m"]


def test_nothing_found_says_so_and_what_else_to_ask() -> None:
    assert text().startswith("nothing of 'x' is among the last 7 refusals and failures; ")
    assert text(remembered=0) == "nothing was refused, and nothing has failed"


def test_text_of_strangers_cannot_move_the_cursor() -> None:
    assert "\x1b" not in text({**ROW, "asked": "GET \x1b[2J", "user": "\u202e"})
