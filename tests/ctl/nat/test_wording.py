"""The text of netproxyctl nat: what was found out, which peers are reached, what to set."""

from __future__ import annotations

import pytest

from netproxy.admin.nat.report import (
    ADDRESS_AND_PORT_DEPENDENT,
    ADDRESS_DEPENDENT,
    DEPENDENT,
    ENDPOINT_INDEPENDENT,
    UNKNOWN,
    Lifetime,
    Report,
    ServerReport,
)
from netproxy.ctl.nat.wording import WIDTH, Result, needs_relay, report_text

SERVER = ServerReport(
    "stun.example:3478",
    "192.0.2.10:3478",
    "203.0.113.5:40000",
    "192.0.2.11:3479",
    "Coturn",
    12.3,
    "",
)
REPORT = Report(
    [SERVER],
    works=True,
    local="192.168.1.5:5000",
    external=["203.0.113.5:40000"],
    nat=True,
    mapping=ENDPOINT_INDEPENDENT,
    filtering=ADDRESS_AND_PORT_DEPENDENT,
    hairpin=False,
    port_preserved=False,
)


def words(report: Report, via: str = "") -> str:
    """Return the paragraphs, each as one line."""
    return "\n".join(
        " ".join(paragraph.split())
        for paragraph in report_text(Result(via, "", report)).split("\n\n")
    )


def test_whole_text() -> None:
    assert (
        report_text(Result("", "IPv4", REPORT))
        == """\
IPv4 from this machine

server             address          sees               second address   software  answer
stun.example:3478  192.0.2.10:3478  203.0.113.5:40000  192.0.2.11:3479  Coturn    12.3 ms

external address  203.0.113.5:40000, local 192.168.1.5:5000
NAT               yes
mapping           endpoint-independent: all targets see the same address and port
filtering         address-and-port-dependent: only the address and port that was sent to may answer
hairpinning       no
ports preserved   no

Games and WebRTC: moderate.  Peers are reached directly if their mapping is
endpoint-independent as well.  Peers with a dependent mapping (many mobile and
company networks) need a relay (TURN).

Two peers behind the same NAT cannot use each other's external address; they
need their local addresses or a relay.

Leave 'mapping' and 'filtering' in 'udp' of a listener as they are.  For
clients outside set 'announce: 203.0.113.5', or 'announce: auto' with 'stun',
and forward the TCP and UDP port of the listener to this machine."""
    )


PEERS = {
    "open": ((ENDPOINT_INDEPENDENT, ENDPOINT_INDEPENDENT), "open. Every peer"),
    "filters by address": ((ENDPOINT_INDEPENDENT, ADDRESS_DEPENDENT), "moderate. Every peer that"),
    "filters by port": (
        (ENDPOINT_INDEPENDENT, ADDRESS_AND_PORT_DEPENDENT),
        "need a relay (TURN).\n",
    ),
    "unknown filtering": (
        (ENDPOINT_INDEPENDENT, UNKNOWN),
        "need a relay (TURN), if filtering is dependent.\n",
    ),
    "unknown mapping": ((UNKNOWN, UNKNOWN), "the rest is unknown. A server of RFC 5780"),
    "dependent": ((DEPENDENT, UNKNOWN), "strict. Peers cannot be told which port"),
    "address-dependent": ((ADDRESS_DEPENDENT, ENDPOINT_INDEPENDENT), "strict. Peers cannot"),
    "symmetric": ((ADDRESS_AND_PORT_DEPENDENT,) * 2, "strict. Peers cannot"),
}


@pytest.mark.parametrize(("kinds", "text"), PEERS.values(), ids=PEERS)
def test_peers_that_are_reached_are_told(kinds: tuple[str, str], text: str) -> None:
    mapping, filtering = kinds
    report = REPORT._replace(mapping=mapping, filtering=filtering)
    assert text in words(report)
    assert needs_relay(report) == ("strict" in words(report))


def test_reason_of_what_is_unknown_is_told() -> None:
    report = REPORT._replace(
        mapping=UNKNOWN,
        filtering=UNKNOWN,
        hairpin=None,
        unknown={"mapping": "no MAPPED", "filtering": "no CHANGE", "hairpin": "no PIN"},
    )
    lines = report_text(Result("", "IPv4", report)).splitlines()
    assert "mapping           unknown: no MAPPED" in lines
    assert "filtering         unknown: no CHANGE" in lines
    assert "hairpinning       unknown: no PIN" in lines


LIFETIMES = {
    "between": (Lifetime(25, 35), "kept for 25 to 35 seconds", "more than 25 seconds may lose"),
    "short": (Lifetime(0, 15), "kept for less than 15 seconds", "more than a few seconds may lose"),
    "long": (Lifetime(305), "kept for more than 305 seconds", ""),
    "unknown": (Lifetime(unknown="no PORT"), "unknown: no PORT", ""),
}


@pytest.mark.parametrize(("lifetime", "line", "meaning"), LIFETIMES.values(), ids=LIFETIMES)
def test_lifetime_of_mappings_is_told(lifetime: Lifetime, line: str, meaning: str) -> None:
    text = words(REPORT._replace(lifetime=lifetime))
    assert f"idle mappings {line}" in text
    assert meaning in text and bool(meaning) == ("may lose" in text)


def test_machine_without_nat_needs_no_announce() -> None:
    report = REPORT._replace(nat=False, hairpin=None, filtering=ENDPOINT_INDEPENDENT)
    assert words(report).endswith("There is no NAT: listeners need no 'announce'.")
    firewall = words(report._replace(filtering=ADDRESS_AND_PORT_DEPENDENT))
    assert firewall.endswith("open the listener's UDP port for clients outside.")


def test_dependent_mapping_leads_to_an_upstream() -> None:
    assert "test it with --via" in words(REPORT._replace(mapping=DEPENDENT))


def test_upstream_has_words_of_its_own() -> None:
    report = REPORT._replace(local="", nat=None, port_preserved=None)
    text = words(report, "office")
    assert text.startswith("UDP through upstream 'office'\n")
    assert "hold for sessions of UDP through this upstream" in text
    assert "Their clients are seen as 203.0.113.5" in text
    each = report._replace(per_target=True, mapping=ADDRESS_AND_PORT_DEPENDENT)
    assert words(each, "office").endswith("socks5://, tunnel://, or 'udp: uot'.")
    assert "Two peers behind" not in words(each, "office")


def test_address_of_ipv6_has_no_brackets_in_a_setting() -> None:
    report = REPORT._replace(external=["[2001:db8::5]:40000"])
    assert "'announce: 2001:db8::5'" in words(report)


class TestNoUdp:
    SILENT = Report([SERVER._replace(mapped="", address="", error="no answer")])

    def test_from_this_machine(self) -> None:
        text = words(self.SILENT)
        assert "No UDP: no server has answered. A firewall drops UDP" in text
        assert "WebRTC needs a relay (TURN) over TCP or TLS." in text

    def test_through_an_upstream(self) -> None:
        text = words(self.SILENT, "office")
        assert text.endswith(
            "No UDP: no server has answered. Upstream 'office' drops UDP, or these servers are "
            "down: try another --server."
        )

    def test_error_is_the_reason(self) -> None:
        row = self.SILENT.servers[0]
        report = Report([row, row._replace(error="network is unreachable")])
        assert "No UDP: network is unreachable. Games need another network." in words(report)

    def test_server_without_an_address_shows_that_udp_works(self) -> None:
        report = Report([SERVER._replace(mapped="", error="error 500")], works=True)
        assert words(report).endswith("no server has told an address. Try another --server.")


def test_text_fits_and_strangers_cannot_move_the_cursor() -> None:
    row = SERVER._replace(software="evil\x1b[2J\n", error="\x1b[1m")
    text = report_text(Result("office\x1b", "", REPORT._replace(servers=[row])))
    assert "\x1b" not in text
    paragraphs = text.split("\n\n")[3:]
    assert all(len(line) <= WIDTH for text in paragraphs for line in text.splitlines())
