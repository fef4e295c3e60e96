"""The steps of a connection in the log."""

from __future__ import annotations

from netproxy.interfaces.addresses import Address
from netproxy.observe.records import DEBUG, Fields
from netproxy.observe.trace import LogTrace


class Written:
    """The log of a LogTrace."""

    def __init__(self) -> None:
        self.records: list[tuple[int, Fields]] = []

    def record(self, level: int, fields: Fields) -> None:
        self.records.append((level, fields))


def test_step_has_client_listener_time_and_its_values() -> None:
    written = Written()
    trace = LogTrace(written, "main", Address("192.0.2.1", 4000))
    trace.step("routed", target=Address("a.example", 443), rule="")
    ((level, fields),) = written.records
    assert level == DEBUG and float(str(fields["after"])) >= 0
    assert {key: value for key, value in fields.items() if key != "after"} == {
        "msg": "step",
        "step": "routed",
        "listener": "main",
        "client": "192.0.2.1:4000",
        "target": "a.example:443",
        "rule": "-",
    }
