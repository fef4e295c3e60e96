"""Lists of networks, as access control uses them."""

from netproxy.interfaces.networks import IpNetwork, NetworkSet


def test_network_list_holds_addresses_of_all_its_networks() -> None:
    networks = NetworkSet(
        [IpNetwork.parse("10.0.0.0/8"), IpNetwork.parse("fd00::/8"), IpNetwork.parse("192.0.2.1")]
    )
    for host in ("10.1.2.3", "fd00::1", "fd00::1%eth0", "192.0.2.1"):
        assert host in networks
    for host in ("11.0.0.1", "fe80::1", "192.0.2.2", "ten.example", ""):
        assert host not in networks


def test_empty_network_list_holds_no_address() -> None:
    assert "127.0.0.1" not in NetworkSet([])
