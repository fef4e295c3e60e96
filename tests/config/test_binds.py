"""`bind` and `rotate` of upstreams, users and listeners in the file."""

from __future__ import annotations

import pytest

from netproxy.config.schema import HopConfig
from netproxy.config.sections.binds import parse_bind
from netproxy.interfaces.networks import IpNetwork
from netproxy.interfaces.routing import Bind
from tests.config.reading import HASH, default, default_errors, errors, read

pytest.importorskip("yaml")

PREFIX = "2001:db8:1::/64"
NETWORK = IpNetwork.parse(PREFIX)
USER = f"password: '{HASH}'"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("192.0.2.1", Bind("192.0.2.1", address="192.0.2.1")),
        ("2001:db8::1", Bind("2001:db8::1", address="2001:db8::1")),
        ("eth0.100", Bind("eth0.100", device="eth0.100")),
        ("incoming", Bind("incoming", incoming=True)),
        (PREFIX, Bind(PREFIX, prefix=NETWORK)),
        ("192.0.2.7/32", Bind("192.0.2.7/32", prefix=IpNetwork.parse("192.0.2.7"))),
        (
            "::ffff:192.0.2.0/120",
            Bind("::ffff:192.0.2.0/120", prefix=IpNetwork.parse("192.0.2.0/24")),
        ),
    ],
)
def test_bind_is_an_address_an_interface_incoming_or_a_prefix(text: str, expected: Bind) -> None:
    assert parse_bind(text) == expected


def test_v4_mapped_address_is_the_ipv4_address() -> None:
    text = "::ffff:192.0.2.1"
    assert parse_bind(text) == Bind(text, address="192.0.2.1")


@pytest.mark.parametrize(
    "text, what",
    [
        ("0.0.0.0", "is the unspecified address"),
        ("::", "is the unspecified address"),
        ("::ffff:0.0.0.0", "is the unspecified address"),
        ("0.0.0.0/8", "holds the unspecified address"),
        ("::/64", "holds the unspecified address"),
        ("::/0", "holds the unspecified address"),
        ("224.0.0.1", "is a multicast address"),
        ("ff02::1", "is a multicast address"),
        ("239.1.0.0/16", "holds a multicast address"),
        ("128.0.0.0/1", "holds a multicast address"),
        ("ff00::/8", "holds a multicast address"),
        ("255.255.255.255", "is the broadcast address"),
        ("240.0.0.0/4", "holds the broadcast address"),
    ],
)
def test_address_that_no_connection_can_leave_from_is_refused(text: str, what: str) -> None:
    assert default_errors(f"{{url: direct, bind: '{text}'}}") == [
        f"c.yaml:1:30: default.bind: '{text}' {what}: no connection can leave from it"
    ]


@pytest.mark.parametrize("text", ["127.0.0.1", "::1", "223.255.255.0/24", "fe00::/8"])
def test_addresses_beside_those_are_accepted(text: str) -> None:
    assert parse_bind(text).text == text


def test_prefix_with_host_bits_is_refused_with_the_prefix_that_is_meant() -> None:
    assert default_errors("{url: direct, bind: '2001:db8:1::5/64'}") == [
        "c.yaml:1:30: default.bind: '2001:db8:1::5/64' is not a valid network: "
        "bits behind the prefix are set (write 2001:db8:1::/64)"
    ]


@pytest.mark.parametrize(
    "text, period",
    [
        *((word, 0.0) for word in ("connection", "client", "user", "target")),
        ("10m", 600.0),
        ("1h30m", 5400.0),
    ],
)
def test_rotate_is_a_word_or_a_duration(text: str, period: float) -> None:
    expected = Bind(PREFIX, prefix=NETWORK, rotate=text, period=period)
    (step,) = default(f"{{url: direct, bind: '{PREFIX}', rotate: {text}}}").steps
    assert step == HopConfig("direct", bind=expected)
    (step,) = default(f"'direct?bind={PREFIX}&rotate={text}'").steps
    assert step == HopConfig("direct", bind=expected)
    assert str(expected) == f"{PREFIX}, rotate {text}"


@pytest.mark.parametrize(
    "text, message",
    [
        (
            f"bind: '{PREFIX}', rotate: ^daily",
            "rotate: 'daily' is neither one of connection, client, user, target nor a duration",
        ),
        (
            f"bind: '{PREFIX}', rotate: ^5",
            "rotate: '5' has no unit: write 5s for seconds or 5ms for milliseconds",
        ),
        (f"bind: '{PREFIX}', rotate: ^500ms", "rotate: must be at least 1s"),
        (
            "bind: 192.0.2.1, rotate: ^client",
            "rotate: needs a prefix as bind, such as 2001:db8:1::/64",
        ),
        (
            "bind: incoming, rotate: ^client",
            "rotate: needs a prefix as bind, such as 2001:db8:1::/64",
        ),
        ("rotate: ^client", "rotate: needs a prefix as bind, such as 2001:db8:1::/64"),
    ],
)
def test_wrong_rotate_is_refused(text: str, message: str) -> None:
    """`^` stands before the place of the error."""
    before = "default: {url: direct, "
    assert errors(f"{before}{text.replace('^', '')}}}") == [
        f"c.yaml:1:{len(before) + text.index('^') + 1}: default.{message}"
    ]


def test_bind_of_a_tunnel_is_refused() -> None:
    agents = "tunnel: {bridge: {listen: 'tcp://127.0.0.1:7000', agents: {home: {token: t}}}}"
    assert "takes no option except timeout" in "".join(
        default_errors("{url: 'tunnel://home', bind: incoming}", agents)
    )


def test_user_and_listener_have_a_bind() -> None:
    config = read(
        f"users: {{alice: {{{USER}, bind: 192.0.2.7}}, "
        f"bob: {{{USER}, bind: '{PREFIX}', rotate: 1m}}, carol: {{{USER}}}}}\n"
        "listeners: [{listen: '127.0.0.1:1', bind: incoming}, {listen: '127.0.0.1:2'}]"
    )
    assert [user.bind for user in config.users.values()] == [
        Bind("192.0.2.7", address="192.0.2.7"),
        Bind(PREFIX, prefix=NETWORK, rotate="1m", period=60.0),
        None,
    ]
    incoming = Bind("incoming", incoming=True)
    assert [listener.bind for listener in config.listeners] == [incoming, None]


def test_error_in_the_bind_of_a_user_or_a_listener_has_its_place() -> None:
    assert errors(f"users: {{alice: {{{USER}, bind: a/b}}}}")[0].endswith(
        "users.alice.bind: 'a/b' is neither an address, a prefix, an interface nor incoming"
    )
    assert errors("listeners: [{listen: '127.0.0.1:1', rotate: client}]") == [
        "c.yaml:1:45: listeners[0].rotate: needs a prefix as bind, such as 2001:db8:1::/64"
    ]


@pytest.mark.parametrize("protocol", ["dns", "tunnel"])
def test_listener_that_leads_nowhere_has_no_bind(protocol: str) -> None:
    text = f"listeners: [{{protocol: {protocol}, listen: '127.0.0.1:1', bind: incoming}}]"
    assert any(
        error.endswith(f"listeners[0].bind: has no meaning for the protocol {protocol}")
        for error in errors(text)
    )
