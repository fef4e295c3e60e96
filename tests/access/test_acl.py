from netproxy.interfaces.networks import NetworkSet
from netproxy.interfaces.networks import IpNetwork


def test_an_address_in_any_of_its_networks_is_in_it() -> None:
    networks = NetworkSet(
        [IpNetwork.parse("10.0.0.0/8"), IpNetwork.parse("fd00::/8"), IpNetwork.parse("192.0.2.1")]
    )
    assert all(host in networks for host in ("10.1.2.3", "fd00::1", "fd00::1%eth0", "192.0.2.1"))
    assert not any(
        host in networks for host in ("11.0.0.1", "fe80::1", "192.0.2.2", "ten.example", "")
    )


def test_an_empty_one_holds_nobody() -> None:
    assert "127.0.0.1" not in NetworkSet([])
