"""Records of refusals: their fields, and how many a client may cause."""

from __future__ import annotations

import time

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.services import Refusal, dropped
from netproxy.observe import refusals
from netproxy.observe.metrics import Counters
from netproxy.observe.records import INFO, WARNING, Fields
from netproxy.observe.refusals import RefusalLog

REFUSAL = Refusal(
    "requests_refused", "forbidden", "main", "192.0.2.1", Address("a.example", 25), "port 25"
)


class Written:
    """The log of a RefusalLog."""

    def __init__(self) -> None:
        self.records: list[tuple[int, Fields]] = []

    def record(self, level: int, fields: Fields) -> None:
        self.records.append((level, fields))

    def messages(self) -> list[object]:
        return [fields["msg"] for _, fields in self.records]


def report(log: RefusalLog, seconds: float = refusals.WINDOW_SECONDS) -> None:
    for call in log.expire(time.monotonic() + seconds):
        call()


def test_refusal_is_counted_once_and_recorded_once() -> None:
    """Hazard 140."""
    written = Written()
    counters = Counters(RefusalLog(written).note)
    name = counters.refuse(REFUSAL)
    assert counters.items() == [("requests_refused", "forbidden", 1)]
    fields = {
        "msg": "refused",
        "reason": "forbidden",
        "listener": "main",
        "client": "192.0.2.1",
        "user": "-",
        "network": "tcp",
        "asked": "a.example:25",
        "decided": "port 25",
        "id": name,
    }
    assert written.records == [(INFO, fields)] and name


def test_refusal_without_a_record_has_no_id() -> None:
    written = Written()
    counters = Counters(RefusalLog(written).note)
    names = [counters.refuse(REFUSAL) for _ in range(refusals.RECORDS + 2)]
    assert len(set(names[: refusals.RECORDS])) == refusals.RECORDS
    assert names[refusals.RECORDS :] == ["", ""]


def test_datagrams_have_their_number_and_what_is_unknown_a_dash() -> None:
    written = Written()
    counters = Counters(RefusalLog(written).note)
    counters.refuse(dropped("too big"), 5)
    assert counters.value("drops", "too big") == 5
    ((level, fields),) = written.records
    assert level == INFO and fields["datagrams"] == 5 and fields["decided"] == "too big"
    assert fields["client"] == fields["listener"] == fields["asked"] == "-"


def test_refused_connection_is_a_warning() -> None:
    written = Written()
    RefusalLog(written).note(REFUSAL._replace(counter="connections_refused"), 1)
    assert written.records[0][0] == WARNING


def test_long_request_is_shortened() -> None:
    written = Written()
    RefusalLog(written).note(REFUSAL._replace(asked="x" * 1000), 1)
    assert written.records[0][1]["asked"] == "x" * refusals.TEXT_LIMIT + "..."


def test_records_of_one_client_are_limited_and_the_rest_is_told_later() -> None:
    """Hazard 140."""
    written = Written()
    log = RefusalLog(written)
    for _ in range(refusals.RECORDS + 7):
        log.note(REFUSAL, 1)
    assert len(written.records) == refusals.RECORDS
    log.note(REFUSAL._replace(client="192.0.2.2"), 1)
    log.note(REFUSAL._replace(counter="connections_refused"), 1)
    assert len(written.records) == refusals.RECORDS + 2
    report(log, 0.0)
    assert len(written.records) == refusals.RECORDS + 2
    report(log)
    level, fields = written.records[-1]
    assert (level, dict(fields)) == (
        INFO,
        {
            "msg": refusals.SUPPRESSED,
            "client": "192.0.2.1",
            "counter": "requests_refused",
            "reason": "forbidden",
            "amount": 7,
        },
    )
    log.note(REFUSAL, 1)
    assert written.messages().count("refused") == refusals.RECORDS + 3


def test_refusals_for_one_reason_take_no_record_of_another() -> None:
    """Hazard 140: a client without a login gets many a 407, and asks for port 25 then."""
    written = Written()
    log = RefusalLog(written)
    for _ in range(refusals.RECORDS + 2):
        log.note(REFUSAL._replace(reason="proxy authentication required"), 1)
    log._seconds.clear()
    for _ in range(refusals.RECORDS + 1):
        log.note(REFUSAL, 1)
    reasons = [fields["reason"] for _, fields in written.records]
    assert [reasons.count(reason) for reason in dict.fromkeys(reasons)] == [refusals.RECORDS] * 2
    report(log)
    assert [
        (fields["reason"], fields["amount"])
        for _, fields in written.records[2 * refusals.RECORDS :]
    ] == [("proxy authentication required", 2), ("forbidden", 1)]


def test_hosts_of_one_ipv6_network_are_one_client() -> None:
    written = Written()
    log = RefusalLog(written)
    for number in range(2 * refusals.RECORDS):
        log.note(REFUSAL._replace(client=f"2001:db8::{number:x}"), 1)
    assert len(written.records) == refusals.RECORDS


def test_records_of_all_clients_are_limited_and_memory_is_bounded() -> None:
    written = Written()
    log = RefusalLog(written)
    amount = refusals.WINDOWS_LIMIT + 50
    for number in range(amount):
        # The clock stands still: what comes later is in the same second.
        log._seconds = {name: (time.monotonic(), at[1]) for name, at in log._seconds.items()}
        log.note(REFUSAL._replace(client=f"10.0.{number // 250}.{number % 250}"), 1)
    assert len(written.records) == refusals.RECORDS_PER_SECOND
    assert len(log._windows) == refusals.WINDOWS_LIMIT
    report(log)
    assert not log._windows
    left_out = [dict(fields)["amount"] for _, fields in written.records if "amount" in fields]
    assert sum(int(str(number)) for number in left_out) == amount - refusals.RECORDS_PER_SECOND


def test_report_names_the_clients_with_the_most_refusals() -> None:
    """Hazard 140."""
    written = Written()
    log = RefusalLog(written)
    clients = 3 * refusals.RECORDS_PER_SECOND
    for number in range(clients):
        log.note(REFUSAL._replace(client=f"10.0.0.{number}"), 1)
        log.note(REFUSAL._replace(client=f"10.0.0.{number}"), 100 + number)
    written.records.clear()
    report(log)
    told = {str(fields["client"]): fields["amount"] for _, fields in written.records}
    assert len(written.records) == len(told) == refusals.RECORDS_PER_SECOND + 1
    most = range(clients - refusals.RECORDS_PER_SECOND, clients)
    rest = told.pop(refusals.OTHERS)
    assert told == {f"10.0.0.{number}": 101 + number for number in most}
    written.records.clear()
    report(log)
    assert rest and not written.records


def test_flood_of_one_client_is_counted_without_a_refusal() -> None:
    """Hazard 140."""
    written = Written()
    log = RefusalLog(written)
    counters = Counters(log.note, log.leaves_out)
    key = REFUSAL.counter, REFUSAL.reason, REFUSAL.client
    for _ in range(refusals.RECORDS + 1):
        assert not counters.refuse_unrecorded(*key, 1)
        counters.refuse(REFUSAL)
    assert counters.refuse_unrecorded(*key, 5) and counters.refuse_unrecorded(*key, 7)
    assert not counters.refuse_unrecorded(REFUSAL.counter, REFUSAL.reason, "192.0.2.2", 1)
    assert counters.value(REFUSAL.counter, REFUSAL.reason) == refusals.RECORDS + 1 + 12
    report(log)
    told = [(fields.get("client"), fields.get("amount")) for _, fields in written.records]
    assert told[refusals.RECORDS :] == [("192.0.2.1", 1 + 12)]
    # The minute is over, and with it the silence.
    assert not counters.refuse_unrecorded(*key, 1)


def test_flood_of_many_clients_is_counted_without_a_refusal() -> None:
    """Hazard 140."""
    written = Written()
    log = RefusalLog(written)
    for number in range(refusals.RECORDS_PER_SECOND):
        log.note(REFUSAL._replace(client=f"10.0.0.{number}"), 1)
    count = log._seconds[REFUSAL.counter][1]
    # The clock stands still: what comes now is in the same second.
    log._seconds[REFUSAL.counter] = time.monotonic() + refusals.WINDOW_SECONDS, count
    assert log.leaves_out(REFUSAL.counter, REFUSAL.reason, "192.0.2.1", 3)
    assert log.leaves_out(REFUSAL.counter, REFUSAL.reason, "192.0.2.2", 4)
    assert not log.leaves_out("drops", REFUSAL.reason, "192.0.2.1", 1)
    report(log, refusals.WINDOW_SECONDS + 1)
    told = [(fields.get("client"), fields.get("amount")) for _, fields in written.records]
    assert told[refusals.RECORDS_PER_SECOND :] == [(refusals.OTHERS, 7)]


def test_child_begins_with_nothing_although_the_lock_is_held() -> None:
    written = Written()
    log = RefusalLog(written)
    for _ in range(refusals.RECORDS + 3):
        log.note(REFUSAL, 1)
    with log._lock:
        log.begin_in_child()
        assert log.note(REFUSAL, 1)
    # The parent reports what it has left out.
    report(log)
    assert refusals.SUPPRESSED not in written.messages()
