"""How probes are sent again, what counts as their answer, and how servers are written."""

from __future__ import annotations

from typing import Callable

import pytest

from netproxy.admin.nat.report import ENDPOINT_INDEPENDENT
from netproxy.admin.nat.exchange import (
    GIVE_UP_SECONDS,
    SEND_SECONDS,
    Arrival,
    ServerError,
    parse_server,
    probe_nat,
)
from netproxy.interfaces.addresses import Address
from netproxy.protocol import stun
from tests.support.stun import FIRST, LONE, Nat, Script, Server, SimulatedNat

SERVERS = {
    "stun.example": Address("stun.example", 3478),
    "STUN.Example:19302": Address("stun.example", 19302),
    "192.0.2.1": Address("192.0.2.1", 3478),
    "192.0.2.1:1": Address("192.0.2.1", 1),
    "[2001:db8::1]": Address("2001:db8::1", 3478),
    "[2001:db8::1]:65535": Address("2001:db8::1", 65535),
    "2001:db8::1": Address("2001:db8::1", 3478),
}


@pytest.mark.parametrize(("text", "address"), SERVERS.items(), ids=SERVERS)
def test_server_is_parsed(text: str, address: Address) -> None:
    assert parse_server(text) == address


@pytest.mark.parametrize(
    "text",
    ["", ":", "host:", "host:0", "host:65536", "host:1e3", "host:9999999", "host:\u0663", "a b",
     "stun:stun.example:3478", "[::1", "h\u00f6st", "a/b", "host:1:2"],
)  # fmt: skip
def test_text_that_is_no_server_is_refused(text: str) -> None:
    with pytest.raises(ServerError, match="is not a server"):
        parse_server(text)


def test_lost_requests_are_sent_again_with_their_transaction_id() -> None:
    server = Server(LONE, script=Script(second=False, lost=len(SEND_SECONDS)))
    transport = SimulatedNat(Nat(), [server])
    report = probe_nat([LONE], transport, transport.clock)
    assert report.works
    first = [request.transaction for _, request in server.requests[: len(SEND_SECONDS) + 1]]
    assert len(set(first)) == 1
    assert transport.now == 100 + 2 * SEND_SECONDS[-1] + GIVE_UP_SECONDS
    assert len({request.transaction for _, request in server.requests}) == 2


def test_probe_is_given_up() -> None:
    transport = SimulatedNat(Nat(), [])
    assert not probe_nat([LONE], transport, transport.clock).works
    assert transport.sent == [(0, LONE)] * (1 + len(SEND_SECONDS))


def test_error_of_sending_ends_a_probe() -> None:
    transport = SimulatedNat(Nat(), [Server()])
    transport.errors[LONE.host] = "network is unreachable"
    report = probe_nat([LONE, FIRST], transport, transport.clock)
    assert [server.error for server in report.servers] == ["network is unreachable", ""]
    assert transport.sent.count((0, LONE)) == 1


def test_error_that_the_network_reports_ends_a_probe() -> None:
    transport = SimulatedNat(Nat(), [Server()])
    transport.reports[LONE] = "connection refused"
    report = probe_nat([LONE, FIRST], transport, transport.clock)
    assert [server.error for server in report.servers] == ["connection refused", ""]


def test_all_servers_are_asked_before_the_first_answer_is_waited_for() -> None:
    transport = SimulatedNat(Nat(), [])
    probe_nat([LONE, FIRST], transport, transport.clock)
    assert transport.sent[:2] == [(0, LONE), (0, FIRST)]


Forge = Callable[[bytes], bytes]
FORGED: dict[str, Forge] = {
    "nothing": lambda request: b"",
    "no message of STUN": lambda request: b"\0\0\0\1" + bytes(30),
    "another transaction": lambda request: answer(bytes(12)),
    "the request itself": lambda request: request,
    "an answer without address": lambda request: b"\1\1\0\0" + request[4:20],
    "an unknown attribute": lambda request: b"\1\1\0\4" + request[4:20] + b"\x7f\0\0\0",
}


def answer(transaction: bytes) -> bytes:
    return stun.encode_response(stun.BindingSuccess(transaction, Address("192.0.2.99", 9)))


@pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED)
def test_what_is_no_answer_is_ignored(forge: Forge) -> None:
    """Hazard 157."""

    class Forged(SimulatedNat):
        def send(self, port: int, target: Address, data: bytes) -> None:
            self.arrived.append(Arrival(port, target, forge(data)))
            super().send(port, target, data)

    transport = Forged(Nat(filtering=ENDPOINT_INDEPENDENT), [Server()])
    report = probe_nat([FIRST], transport, transport.clock)
    assert (report.mapping, report.filtering) == (ENDPOINT_INDEPENDENT, ENDPOINT_INDEPENDENT)
    assert report.external == ["203.0.113.5:40000"]


def test_upstream_that_connects_slowly_has_the_whole_time_for_its_answers() -> None:
    class Slow(SimulatedNat):
        def send(self, port: int, target: Address, data: bytes) -> None:
            if not self.sent:
                self.now += 60
            super().send(port, target, data)

    server = Server(LONE, script=Script(second=False, lost=1))
    transport = Slow(Nat(), [server])
    assert probe_nat([LONE], transport, transport.clock).works
