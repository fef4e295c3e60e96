"""A dictionary with a limit: what is kept, and what is removed for it."""

from __future__ import annotations

from netproxy.interfaces.bounded import BoundedDict


def filled(limit: int, keys: str) -> BoundedDict[str, int]:
    """Return a dictionary into which the letters of `keys` were put, each with its place."""
    bounded: BoundedDict[str, int] = BoundedDict(limit)
    for place, key in enumerate(keys):
        bounded.put(key, place)
    return bounded


def test_oldest_key_is_removed_for_a_new_one() -> None:
    assert dict(filled(3, "abcd")) == {"b": 1, "c": 2, "d": 3}


def test_key_that_is_put_again_is_the_newest() -> None:
    bounded = filled(3, "abca")
    assert list(bounded.items()) == [("b", 1), ("c", 2), ("a", 3)]
    bounded.put("d", 4)
    assert list(bounded) == ["c", "a", "d"]


def test_reading_a_key_does_not_make_it_newer() -> None:
    bounded = filled(2, "ab")
    assert bounded["a"] == bounded.get("a") == 0
    bounded.put("c", 2)
    assert list(bounded) == ["b", "c"]


def test_limit_of_zero_keeps_nothing() -> None:
    assert not filled(0, "ab")


def test_lower_limit_takes_effect_with_the_next_put() -> None:
    bounded = filled(5, "abcde")
    bounded.limit = 2
    assert len(bounded) == 5
    bounded.put("f", 5)
    assert list(bounded) == ["e", "f"]


def test_removed_key_makes_room() -> None:
    bounded = filled(2, "ab")
    assert bounded.pop("b") == 1
    bounded.put("c", 2)
    assert list(bounded) == ["a", "c"]
