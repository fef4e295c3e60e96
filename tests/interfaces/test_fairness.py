"""Fair shares: what counts as one client, which item yields, who does shared work."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from netproxy.interfaces.fairness import Claims, FairTable, client_key


@pytest.mark.parametrize(
    "host, key",
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::9", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("::1", "::/64"),
        ("fe80::1%2", "fe80::1%2"),
        ("fe80::2%2", "fe80::2%2"),
        ("febf::1", "febf::1"),
        ("fec0::1", "fec0::/64"),
        ("", ""),
        ("a name", "a name"),
    ],
)
def test_client_is_an_ipv4_address_or_an_ipv6_network(host: str, key: str) -> None:
    assert client_key(host) == key


class TestFairTable:
    def test_items_of_a_client_are_taken_in_order(self) -> None:
        table: FairTable[int] = FairTable(9)
        for item in (3, 1, 2):
            assert table.put("a", item) is None
        table.put("b", 9)
        assert [table.take("a") for _ in range(3)] == [3, 1, 2]
        assert (len(table), table.held("a"), table.held("b")) == (1, 0, 1)
        with pytest.raises(KeyError):
            table.take("a")

    def test_client_that_holds_most_yields_its_oldest_item(self) -> None:
        table: FairTable[str] = FairTable(4)
        for item in ("a1", "a2", "a3", "b1"):
            table.put(item[0], item)
        assert table.put("b", "b2") == "a1"
        # a and b have two items each, b for longer.
        assert table.put("c", "c1") == "b1"
        assert table.put("c", "c2") == "a2"
        assert sorted(table.clear()) == ["a3", "b2", "c1", "c2"] and not len(table)

    def test_items_that_yield_first_are_the_oldest_of_the_client_with_most(self) -> None:
        table: FairTable[str] = FairTable(9)
        assert table.yielding(2) == []
        for item in ("a1", "b1", "b2", "b3"):
            table.put(item[0], item)
        assert table.yielding(2) == ["b1", "b2"]
        assert table.yielding(9) == ["b1", "b2", "b3"] and len(table) == 4

    def test_clients_and_their_items_are_found_by_count(self) -> None:
        table: FairTable[str] = FairTable(9)
        assert (table.most, table.holders(1), table.items_of("a")) == (0, [], [])
        for item in ("a1", "c1", "b1", "b2"):
            table.put(item[0], item)
        assert (table.most, table.holders(2), table.holders(1)) == (2, ["b"], ["a", "c"])
        assert table.items_of("b") == ["b1", "b2"]
        table.remove("b", "b1")
        assert (table.most, table.holders(1)) == (1, ["a", "c", "b"])

    def test_client_alone_loses_its_oldest_item(self) -> None:
        table: FairTable[int] = FairTable(2)
        assert [table.put("a", item) for item in range(5)] == [None, None, 0, 1, 2]

    def test_among_equals_the_earliest_yields(self) -> None:
        table: FairTable[str] = FairTable(3)
        for client in "abc":
            table.put(client, client)
        assert [table.put(client, client) for client in "de"] == ["a", "b"]

    def test_table_without_room_returns_the_item_itself(self) -> None:
        table: FairTable[str] = FairTable(0)
        assert table.put("a", "a1") == "a1" and not len(table)

    def test_removed_item_makes_room(self) -> None:
        table: FairTable[int] = FairTable(2)
        table.put("a", 1)
        table.put("a", 2)
        table.remove("a", 1)
        assert table.put("b", 3) is None and table.take("a") == 2

    @pytest.mark.parametrize("attackers", [1, 2, 50])
    def test_flood_takes_no_item_of_a_client_with_its_share(self, attackers: int) -> None:
        """Hazard 138."""
        table: FairTable[object] = FairTable(256)
        share = 256 // (attackers + 1)
        good = [object() for _ in range(share)]
        for number in range(1000):
            table.put(f"attacker {number % attackers}", object())
            if number < share:
                table.put("good", good[number])
        assert [table.take("good") for _ in good] == good

    def test_random_calls_agree_with_counts(self) -> None:
        """After each call no client holds more than one item above the most it may hold."""
        chance = random.Random(7)
        table: FairTable[int] = FairTable(20)
        held: dict[str, list[int]] = {}
        for number in range(5000):
            client = f"c{chance.randrange(8)}"
            items = held.setdefault(client, [])
            if items and chance.random() < 0.4:
                item = chance.choice(items)
                items.remove(item)
                table.remove(client, item)
            else:
                items.append(number)
                yielded = table.put(client, number)
                most = max(map(len, held.values()))
                if yielded is not None:
                    (loser,) = [name for name in held if yielded in held[name]]
                    assert len(held[loser]) == most and held[loser][0] == yielded
                    held[loser].remove(yielded)
            assert len(table) == sum(map(len, held.values())) <= 20
            assert Counter({name: table.held(name) for name in held}) == Counter(
                {name: len(items) for name, items in held.items()}
            )


class TestClaims:
    def test_each_client_has_one_claim(self) -> None:
        claims = Claims()
        assert [claims.add(client) for client in ("a", "a", "b")] == [True, False, True]

    def test_first_task_does_the_work(self) -> None:
        claims = Claims()
        claims.add("a")
        claims.add("b")
        assert [claims.begin(), claims.begin()] == [True, False]
        assert not claims.add("c")

    def test_work_fails_with_its_last_claim(self) -> None:
        claims = Claims()
        claims.add("a")
        claims.add("b")
        assert [claims.drop("a"), claims.drop("b")] == [False, True]

    def test_work_that_has_begun_does_not_fail(self) -> None:
        claims = Claims()
        claims.add("a")
        claims.add("b")
        claims.begin()
        assert not claims.drop("b")
