"""Datagrams of PCP and NAT-PMP: requests and responses, each written anew and read again."""

from __future__ import annotations

import ipaddress
import struct

from netproxy.protocol.port_mapping import nat_pmp, pcp
from tests.fuzz.target import Target, accepted


def _check_pcp(data: bytes) -> None:
    request, response = accepted(pcp.parse_request, data), accepted(pcp.parse_response, data)
    assert request is None or response is None
    message = request or response
    if message is None:
        return
    assert data[0] == 2 and len(data) % 4 == 0 and 24 <= len(data) <= 1100
    assert (data[1] & 0x80 != 0) == (response is not None)
    assert message.lifetime == int.from_bytes(data[4:8], "big")
    if response is not None:
        assert (response.result, response.epoch) == (data[3], int.from_bytes(data[8:12], "big"))
        if response.mapping is not None:
            assert accepted(pcp.parse_response, pcp.encode_response(response)) == response
    else:
        assert ipaddress.ip_address(request.client) == _host(data[8:24])
        assert accepted(pcp.parse_request, pcp.encode_request(request)) == request
    if (mapping := message.mapping) is not None:
        assert (mapping.nonce, {"tcp": 6, "udp": 17}[mapping.network]) == (data[24:36], data[36])
        ports = struct.unpack_from(">HH", data, 40)
        assert (mapping.internal_port, mapping.external.port) == ports
        assert ipaddress.ip_address(mapping.external.host) == _host(data[44:60])


def _host(packed: bytes) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.IPv6Address(packed)
    return address.ipv4_mapped or address


def _check_nat_pmp(data: bytes) -> None:
    request = accepted(nat_pmp.parse_request, data)
    response = accepted(nat_pmp.parse_response, data)
    assert request is None or response is None
    if request is not None:
        # The reserved bytes mean nothing.
        written = nat_pmp.encode_request(request)
        assert written[:2] + written[4:] == data[:2] + data[4:]
        assert accepted(nat_pmp.parse_request, written) == request
    if response is not None:
        assert (response.result, response.epoch) == struct.unpack_from(">HL", data, 2)
        written = nat_pmp.encode_response(response)
        assert accepted(nat_pmp.parse_response, written) == response
        if not response.result:
            assert written == data


def _check(data: bytes) -> None:
    _check_pcp(data)
    _check_nat_pmp(data)


TARGETS = (
    Target(
        "port-mapping",
        _check,
        (
            *(b"\2\1\0\0", b"\2\0\0\0", b"\2\x81\0\0", b"\2\x80\0\0", b"\2\x81\0\2"),
            *(b"\0\0", b"\0\1\0\0", b"\0\2\0\0", b"\0\x80\0\0", b"\0\x81\0\0", b"\0\x82\0\2"),
            *(b"\x06\0\0\0", b"\x11\0\0\0", bytes(10) + b"\xff\xff", b"\4\x38", bytes(12)),
        ),
        1104,
    ),
)
