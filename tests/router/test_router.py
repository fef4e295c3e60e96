from __future__ import annotations

from typing import Any

from netproxy.interfaces import Address, Flow
from netproxy.router.router import ListenerRouter

FLOW = Flow("tcp", Address("192.0.2.1", 5), Address("example.com", 443), "main", "alice")


def test_a_listener_has_its_own_way_out_and_all_others_the_default() -> None:
    default: Any
    own: Any
    default, own = object(), object()
    router = ListenerRouter(default, {"office": own})
    assert router.route(FLOW) is default
    assert router.route(FLOW._replace(listener="office")) is own
    assert router.route(FLOW._replace(listener="office", network="udp", user="", target=Address("::1", 1))) is own


def test_does_not_change_with_what_it_was_made_from() -> None:
    default: Any = object()
    ways: dict[str, Any] = {}
    router = ListenerRouter(default, ways)
    ways["main"] = object()
    assert router.route(FLOW) is default
