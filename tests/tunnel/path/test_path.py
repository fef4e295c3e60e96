"""Both sides of a path: datagrams, attacks, an address that changes, keys that are renewed."""

from __future__ import annotations

import os
import random
import re
import time
from functools import partial
from typing import Callable, Iterator

import pytest

from netproxy.protocol.tunnels.path import BASE_PACKET, OVERHEAD
from netproxy.tunnel.path import keys
from netproxy.tunnel.path.flows import GONE_LIMIT
from netproxy.tunnel.path.mtu import LADDER
from netproxy.tunnel.path.sealing import Cipher, Sealer, load_cipher
from tests.protocol.test_tunnel import MANUAL, MANUAL_OFFER
from tests.tunnel.path.rig import AGENT, BRIDGE, ELSEWHERE, Pair, make_cipher

ADDRESS = b"\1\xc0\0\2\1\0\x35"


def ciphers() -> Iterator[Callable[[bytes], Cipher]]:
    """Yield the cipher of the tests, and the real one if it is installed."""
    yield make_cipher
    real = load_cipher()
    if real is not None:
        yield real


@pytest.fixture(params=list(ciphers()))
def pair(request: pytest.FixtureRequest) -> Pair:
    """Return both sides of a path that is up."""
    pair = Pair(request.param)
    pair.come_up()
    return pair


def test_packet_of_the_manual_is_what_we_seal() -> None:
    make = load_cipher()
    if make is None:
        pytest.skip("python3-cryptography is not installed")
    example = re.search(r"^packet: ([0-9a-f]+)$", MANUAL.read_text(), re.MULTILINE)
    assert example is not None
    sealer = Sealer(make(MANUAL_OFFER.agent_key), MANUAL_OFFER.agent_id)
    assert sealer.seal(b"\1hello", 5).hex() == example[1]


def test_path_comes_up_by_the_agents_ping() -> None:
    pair = Pair()
    first, _ = pair.flows()
    assert not first.send(b"too early")
    pair.come_up()
    assert pair.agent.changes == pair.bridge.changes == ["up"]
    assert pair.bridge.path.describe()["mtu"] == LADDER[-1]
    assert not pair.agent.drops() and not pair.bridge.drops()


@pytest.mark.parametrize("is_addressed", [False, True])
def test_datagrams_pass_both_ways(pair: Pair, is_addressed: bool) -> None:
    address = ADDRESS if is_addressed else b""
    agent, bridge = pair.flows(is_addressed)
    for payloads in ([b"one"], [b""], [b"a" * 9, b"b" * 9, b"c" * 4], [os.urandom(1400)]):
        assert bridge.send(*payloads, prefix=address) and agent.send(*payloads, prefix=address)
        pair.exchange()
        expected = [(payload, address) for payload in payloads]
        assert agent.datagrams[-len(payloads) :] == expected == bridge.datagrams[-len(payloads) :]


def test_train_stays_a_train(pair: Pair) -> None:
    """The packets of one send are opened where they lie, and leave as one send again."""
    agent, bridge = pair.flows()
    payloads = [bytes((number,)) * 1000 for number in range(40)] + [b"the last"]
    assert bridge.send(*payloads)
    pair.agent.take(*(packet for packet, _ in pair.bridge.out), peer=BRIDGE)
    ((span,),) = agent.batches
    assert len(span[0]) == 41 and isinstance(span[0], range) and span[1:3] == (1000, 8)
    assert [payload for payload, _ in agent.datagrams] == payloads


def test_flows_are_told_apart_in_one_train(pair: Pair) -> None:
    (first, sent), (second, more) = pair.flows(), pair.flows()
    assert sent.send(b"first") and more.send(b"other") and sent.send(b"third")
    pair.agent.take(*(packet for packet, _ in pair.bridge.out), peer=BRIDGE)
    assert [payload for payload, _ in first.datagrams] == [b"first", b"third"]
    assert [payload for payload, _ in second.datagrams] == [b"other"]


def test_datagram_that_does_not_fit_is_left_to_the_stream(pair: Pair) -> None:
    agent, bridge = pair.flows()
    room = LADDER[-1] - OVERHEAD - 1
    assert bridge.send(bytes(room)) and not bridge.send(bytes(room + 1), b"")
    pair.exchange()
    assert [len(payload) for payload, _ in agent.datagrams] == [room]
    assert pair.bridge.path.too_long == 2


def test_long_run_is_cut_into_sends(pair: Pair) -> None:
    agent, bridge = pair.flows()
    payloads = [number.to_bytes(2, "big") for number in range(200)]
    assert bridge.send(*payloads)
    pair.exchange()
    assert [payload for payload, _ in agent.datagrams] == payloads


def test_flow_that_has_ended_on_one_side_is_ended_on_the_other(pair: Pair) -> None:
    """Its TCP connection may have been lost in silence: nothing goes into the void for long."""
    (agent, bridge), (other, more) = pair.flows(), pair.flows()
    ended: list[str] = []
    bridge.flow.gone = partial(ended.append, "gone")
    agent.flow.close()
    agent.flow.close()
    for _ in range(3):
        assert bridge.send(b"late") and more.send(b"fine")
        pair.exchange()
    assert not agent.datagrams and len(other.datagrams) == 3
    assert pair.agent.drops() == {"unknown flow": 3} and ended == ["gone"]
    # Told again, if the other side goes on.
    pair.agent.path.tick(time.monotonic())
    assert bridge.send(b"late")
    pair.exchange()
    assert ended == ["gone", "gone"] and len(pair.agent.path.flows) == 1


def test_flows_that_are_gone_are_told_a_few_at_a_time(pair: Pair) -> None:
    ended: list[int] = []
    for number in range(GONE_LIMIT + 5):
        agent, bridge = pair.flows()
        bridge.flow.gone = partial(ended.append, number)
        agent.flow.close()
        assert bridge.send(b"late")
    pair.exchange()
    assert ended == list(range(GONE_LIMIT))


# -- attacks: hazards of packets that are not what the other side has just sent


def captured(pair: Pair, count: int = 3) -> list[bytes]:
    """Return packets of the bridge that did not arrive yet."""
    _, bridge = pair.flows()
    for number in range(count):
        assert bridge.send(b"payload %d" % number)
    packets = [packet for packet, _ in pair.bridge.out]
    pair.bridge.out.clear()
    return packets


def test_replayed_packets_count_once(pair: Pair) -> None:
    """Hazard 166."""
    packets = captured(pair)
    flow = pair.agent.path.flows._flows[1]
    received: list[object] = []
    flow.sink = received.append
    for packet in packets * 2 + packets[:1]:
        pair.agent.take(packet, peer=BRIDGE)
    assert len(received) == 3 and pair.agent.drops() == {"replayed": 4}


def test_reordered_packets_all_count(pair: Pair) -> None:
    """Hazard 166."""
    packets = captured(pair, 200)
    received: list[object] = []
    pair.agent.path.flows._flows[1].sink = received.append
    random.Random(3).shuffle(packets)
    for packet in packets:
        pair.agent.take(packet, peer=BRIDGE)
    assert len(received) == 200 and not pair.agent.drops()


def test_forged_packets_are_dropped(pair: Pair) -> None:
    """Hazard 166: one bit anywhere is enough; the header is protected as well."""
    (packet,) = captured(pair, 1)
    for at in range(len(packet)):
        changed = bytearray(packet)
        changed[at] ^= 1
        pair.agent.take(bytes(changed), peer=BRIDGE)
    drops = pair.agent.drops()
    assert drops == {"malformed": 1, "unknown connection": 8, "forged": len(packet) - 9}
    assert not pair.agent.out, "a forged packet was answered"


def test_truncated_packets_are_dropped(pair: Pair) -> None:
    """Hazard 166."""
    (packet,) = captured(pair, 1)
    for size in range(len(packet)):
        pair.agent.take(packet[:size], peer=BRIDGE)
    drops = pair.agent.drops()
    assert drops == {"malformed": 1, "truncated": OVERHEAD, "forged": len(packet) - OVERHEAD - 1}
    assert not pair.agent.out


def test_reflected_packets_are_dropped(pair: Pair) -> None:
    """Hazard 166: each direction has connection IDs and keys of its own."""
    for packet in captured(pair):
        pair.bridge.take(packet, peer=AGENT)
    assert pair.bridge.drops() == {"unknown connection": 3} and not pair.bridge.out


def test_sealed_nonsense_is_dropped(pair: Pair) -> None:
    sealer = pair.bridge.path._keys.current.sealer
    for plain in (b"", b"\0", b"\0\1short", b"\x41", b"\x7f"):
        packet = sealer.seal(plain, sealer.counter)
        sealer.counter += 1
        pair.agent.take(packet, peer=BRIDGE)
    assert pair.agent.drops() == {"truncated": 1, "malformed": 4}


def test_message_of_a_later_version_is_skipped(pair: Pair) -> None:
    sealer = pair.bridge.path._keys.current.sealer
    packet = sealer.seal(b"\0\x09" + bytes(16), sealer.counter)
    pair.agent.take(packet, peer=BRIDGE)
    assert not pair.agent.drops() and not pair.agent.out


# -- an agent that moves


def test_bridge_follows_the_newest_packet(pair: Pair) -> None:
    """Hazard 169."""
    agent, bridge = pair.flows()
    assert agent.send(b"from elsewhere")
    ((packet, _),) = pair.agent.out
    pair.agent.out.clear()
    pair.bridge.take(packet, peer=ELSEWHERE)
    assert pair.bridge.changes[-1] == "moved"
    assert [to for _, to in pair.bridge.out] == [ELSEWHERE]
    assert bridge.send(b"an answer") and pair.bridge.out[-1][1] == ELSEWHERE
    # Once it has answered from there, the agent is told.
    pair.agent.address_of_side = ELSEWHERE
    pair.exchange()
    assert pair.agent.changes == ["up", "told to have moved"]
    pair.settle_sizes()
    assert pair.agent.changes == ["up", "told to have moved"]


def test_late_packet_from_the_old_address_moves_nothing(pair: Pair) -> None:
    agent, _ = pair.flows()
    assert agent.send(b"first") and agent.send(b"second")
    (late, _), (newest, _) = pair.agent.out
    pair.agent.out.clear()
    pair.bridge.take(newest, peer=ELSEWHERE)
    pair.bridge.take(late, peer=AGENT)
    assert pair.bridge.path.remote is not None and pair.bridge.path.remote.peer == ELSEWHERE


def test_agent_that_moves_to_an_address_not_allowed_is_not_followed(pair: Pair) -> None:
    """Hazard 169: its packets are dropped, and counted; the bridge goes on to send as before."""
    agent, bridge = pair.flows()
    pair.bridge.refused = {ELSEWHERE}
    for payload in (b"first", b"second"):
        assert agent.send(payload)
    packets = [packet for packet, _ in pair.agent.out]
    pair.agent.out.clear()
    for packet in packets[::-1]:
        pair.bridge.take(packet, peer=ELSEWHERE)
    assert pair.bridge.drops() == {"client not allowed": 2}
    assert pair.bridge.path.remote is not None and pair.bridge.path.remote.peer == AGENT
    assert not bridge.datagrams and not pair.bridge.out
    # What was dropped has not been taken: the same packets may still come from where they should.
    pair.bridge.take(packets[0], peer=AGENT)
    assert [payload for payload, _ in bridge.datagrams] == [b"first"]


def test_path_in_use_goes_on_after_its_address_is_not_allowed(pair: Pair) -> None:
    """A reload ends no connection either."""
    agent, bridge = pair.flows()
    pair.bridge.refused = {AGENT}
    assert agent.send(b"goes on")
    pair.exchange()
    assert [payload for payload, _ in bridge.datagrams] == [b"goes on"]
    assert not pair.bridge.drops()


def test_first_packet_from_an_address_not_allowed_brings_no_path_up() -> None:
    pair = Pair()
    pair.bridge.refused = {AGENT}
    pair.agent.path.tick(time.monotonic())
    pair.exchange()
    assert pair.bridge.drops() == {"client not allowed": 1}
    assert pair.bridge.path.remote is None and not pair.agent.path.up


def test_replayed_packet_from_elsewhere_moves_nothing(pair: Pair) -> None:
    """Hazard 167."""
    agent, _ = pair.flows()
    assert agent.send(b"once")
    ((packet, _),) = pair.agent.out
    pair.exchange()
    pair.bridge.take(packet, peer=ELSEWHERE)
    assert pair.bridge.path.remote is not None and pair.bridge.path.remote.peer == AGENT
    assert not pair.bridge.out


def test_little_is_sent_to_an_address_that_has_not_answered(pair: Pair) -> None:
    """Hazard 167: a thief of one packet cannot turn the bridge on a victim."""
    agent, bridge = pair.flows()
    assert agent.send(b"stolen")
    ((packet, _),) = pair.agent.out
    pair.agent.out.clear()
    pair.bridge.take(packet, peer=ELSEWHERE)
    while bridge.send(bytes(1000)):
        pass
    assert sum(len(sent) for sent, _ in pair.bridge.out) <= 3 * len(packet)
    # The agent's next packet leads back, and what it answers lets everything pass again.
    pair.bridge.out.clear()
    assert agent.send(b"from home")
    pair.exchange()
    assert bridge.send(*[bytes(1100)] * 20)
    assert pair.bridge.path.remote is not None and pair.bridge.path.remote.validated


def test_first_packet_of_a_stranger_gets_no_more_than_it_has_sent(pair: Pair) -> None:
    """Hazard 167: even with the keys, PONG and PING are no longer than the PING of an agent."""
    fresh = Pair()
    fresh.agent.path.tick(time.monotonic())
    ((packet, _),) = fresh.agent.out
    assert len(packet) == BASE_PACKET
    fresh.bridge.take(packet, peer=AGENT)
    assert sum(len(sent) for sent, _ in fresh.bridge.out) < 2 * len(packet)


# -- keys


def test_key_is_renewed_while_datagrams_pass(pair: Pair) -> None:
    agent, bridge = pair.flows()
    assert bridge.send(b"old key, on its way")
    (late,) = [packet for packet, _ in pair.bridge.out]
    pair.bridge.out.clear()
    offer = pair.offer()
    offered, used = pair.bridge.epoch(offer), pair.agent.epoch(offer)
    pair.bridge.path.offer(offered)
    pair.bridge.table.add(pair.bridge.path, offered)
    # The bridge goes on with the key before until the agent has the next one.
    assert bridge.send(b"old key")
    pair.exchange()
    pair.agent.table.add(pair.agent.path, used)
    pair.agent.path.use(used)
    pair.exchange()
    assert bridge.send(b"new key") and agent.send(b"new key")
    assert pair.bridge.out[-1][0][1:9] == offer.agent_id
    pair.exchange()
    pair.agent.take(late, peer=BRIDGE)
    expected = [b"old key", b"new key", b"old key, on its way"]
    assert [payload for payload, _ in agent.datagrams] == expected
    assert [payload for payload, _ in bridge.datagrams] == [b"new key"]
    # After a while nothing of the key before is accepted.
    later = time.monotonic() + keys.KEPT_SECONDS + 1
    pair.agent.path.tick(later)
    pair.agent.take(late, peer=BRIDGE)
    assert pair.agent.drops() == {"unknown connection": 1}


def test_old_key_asks_for_another() -> None:
    pair = Pair()
    pair.bridge.begin(pair.offer(), 60.0)
    pair.bridge.path.tick(59.0)
    assert pair.bridge.renewals == 0
    pair.bridge.path.tick(60.0)
    assert pair.bridge.renewals == 1


def test_closed_path_accepts_nothing(pair: Pair) -> None:
    packets = captured(pair)
    pair.agent.path.close()
    for packet in packets:
        pair.agent.take(packet, peer=BRIDGE)
    assert pair.agent.drops() == {"unknown connection": 3}
    agent, _ = pair.flows()
    assert not agent.send(b"nothing")
