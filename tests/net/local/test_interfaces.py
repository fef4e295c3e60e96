"""The address of an interface: that of a real one, and the choice among several of IPv6."""

from __future__ import annotations

from pathlib import Path

import pytest

from netproxy.net.local import interfaces
from netproxy.net.local.interfaces import best_ipv6_address, interface_address

GLOBAL = "20010db8000000000000000000000001 02 40 00 80 eth0"
TEMPORARY = "20010db80000000000000000000000aa 02 40 00 01 eth0"
DEPRECATED = "20010db80000000000000000000000dd 02 40 00 20 eth0"
TENTATIVE = "20010db80000000000000000000000ee 02 40 00 40 eth0"
FAILED = "20010db80000000000000000000000ff 02 40 00 c8 eth0"
UNIQUE_LOCAL = "fd000000000000000000000000000001 02 40 00 80 eth0"
LINK_LOCAL = "fe800000000000000000000000000001 02 40 20 80 eth0"
OTHER = "20010db8000000000000000000000099 03 40 00 80 eth1"


@pytest.mark.parametrize(
    "lines, best",
    [
        ([GLOBAL], "2001:db8::1"),
        ([TEMPORARY, GLOBAL], "2001:db8::1"),
        ([TEMPORARY], "2001:db8::aa"),
        ([DEPRECATED, TEMPORARY], "2001:db8::aa"),
        ([DEPRECATED], "2001:db8::dd"),
        ([UNIQUE_LOCAL, TEMPORARY], "2001:db8::aa"),
        ([UNIQUE_LOCAL, DEPRECATED], "fd00::1"),
        ([LINK_LOCAL, TENTATIVE, FAILED, OTHER], ""),
        (["", "20010db8 02 40 00", "eth0"], ""),
    ],
)
def test_lasting_global_address_is_preferred(lines: list[str], best: str) -> None:
    assert best_ipv6_address("\n".join(lines) + "\n", "eth0") == best


def test_address_of_a_real_interface_is_read() -> None:
    assert interface_address("lo", ipv6=False) == "127.0.0.1"


@pytest.mark.parametrize("ipv6", [False, True])
def test_missing_interface_has_no_address(ipv6: bool) -> None:
    assert interface_address("nonexistent0", ipv6) == ""


def test_machine_without_ipv6_has_no_ipv6_address(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(interfaces, "IPV6_ADDRESSES", str(tmp_path / "none"))
    assert interface_address("lo", ipv6=True) == ""
