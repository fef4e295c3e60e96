"""Slots in shared memory: contents, free ones, torn ones."""

from __future__ import annotations

from netproxy.resolver.client_names.shared_slots import SharedSlots


def test_content_of_a_slot_is_read_back_and_the_others_stay_free() -> None:
    slots = SharedSlots(4, 5)
    slots.write(2, b"hello")
    assert [slots.read(index) for index in range(4)] == [None, None, b"hello", None]
    assert list(slots.contents(slots.raw(1, 3))) == [(1, b"hello")]
    slots.write(2, b"world")
    assert slots.read(2) == b"world"


def test_torn_slot_is_free() -> None:
    slots = SharedSlots(2, 5)
    slots.write(0, b"hello")
    slots.write(1, b"hello")
    slots._memory[10:11] = b"E"
    assert slots.read(0) is None and list(slots.contents(slots.raw(0, 2))) == [(1, b"hello")]
