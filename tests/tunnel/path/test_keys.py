"""Which keys of a path are in use, offered and accepted."""

from __future__ import annotations

from netproxy.tunnel.path.keys import KEPT_SECONDS, Epoch, PathKeys
from netproxy.tunnel.path.sealing import Opener, Sealer
from tests.tunnel.path.rig import make_cipher


def epoch(name: bytes, since: float = 0.0) -> Epoch:
    cipher = make_cipher(name)
    return Epoch(name, Sealer(cipher, name), Opener(cipher), since)


def test_counters_are_taken_in_a_row() -> None:
    keys = PathKeys(epoch(b"first"))
    assert [keys.take(count)[1] for count in (1, 40, 2)] == [0, 1, 41]


def test_offered_key_is_used_once_the_other_side_uses_it() -> None:
    first, second = epoch(b"first"), epoch(b"second")
    keys = PathKeys(first)
    assert keys.offer(second) is None and keys.current is first
    assert not keys.seen(first, 1.0) and keys.seen(second, 1.0)
    assert keys.current is second and not keys.seen(second, 2.0)


def test_offer_that_was_not_taken_is_replaced() -> None:
    first, second, third = epoch(b"first"), epoch(b"second"), epoch(b"third")
    keys = PathKeys(first)
    keys.offer(second)
    assert keys.offer(third) is second and keys.all() == [first, third]


def test_former_key_is_accepted_for_a_while() -> None:
    first, second = epoch(b"first"), epoch(b"second")
    keys = PathKeys(first)
    keys.use(second, 10.0)
    assert keys.expire(10.0 + KEPT_SECONDS - 1) == [] and keys.all() == [second, first]
    assert keys.expire(10.0 + KEPT_SECONDS) == [first] and keys.all() == [second]


def test_key_needs_renewal_once() -> None:
    keys = PathKeys(epoch(b"first", 100.0))
    assert not keys.needs_renewal(159.0, 60.0) and keys.needs_renewal(160.0, 60.0)
    keys.offer(epoch(b"second", 160.0))
    assert not keys.needs_renewal(161.0, 60.0)


def test_no_key_is_in_a_repr() -> None:
    one = epoch(b"secret")
    assert repr(one) == f"Epoch({b'secret'.hex()})" and repr(make_cipher(b"key")) == "Cipher()"
