"""URLs of proxies, as people paste them."""

from __future__ import annotations

import pytest

from netproxy.ctl.convert.source import ConversionError, read_source
from tests.ctl.convert.converting import converted

pytest.importorskip("yaml")

WHOLE = """\
# Made by netproxyctl convert from command line.
# Check it with: netproxyd -t -c FILE

listeners:
  - {protocol: sps, listen: "127.0.0.1:1080"}

upstreams:
  # command line: socks5://***@proxy.example:1080
  # its URL has a password: better write !file and the name of a file with the URL
  proxy.example: socks5://bob:s3cret@proxy.example:1080

default: proxy.example
"""


def test_url_becomes_a_listener_and_its_upstream() -> None:
    words = ("socks5://bob:s3cret@proxy.example:1080",)
    assert converted("url", words[0], "", words).text == WHOLE


@pytest.mark.parametrize(
    "text, upstream",
    [
        ("http://192.0.2.1:3128/", "http://192.0.2.1:3128"),
        ("socks://[2001:db8::1]:1080", "socks5h://[2001:db8::1]:1080"),
        ("socks5h://Ym9iOnB3@192.0.2.1:1080", "socks5h://bob:pw@192.0.2.1:1080"),
        ("socks://Og==@a.example:1080", "socks5h://a.example:1080"),
        ("https://a.example", "https://a.example:443"),
        ("socks5s://a.example:443", "socks5h+tls://a.example:443"),
        (
            "socks5+tls://a.example:443?udp=uot&tls.ca=ca.pem",
            {"url": "socks5+tls://a.example:443", "udp": "uot", "tls": {"ca": "ca.pem"}},
        ),
        (
            "http://a.example:80?mark=3&keepalive=30s&rotate=user&bind=2001:db8::/64",
            {
                **{"url": "http://a.example:80", "mark": 3, "keepalive": "30s"},
                **{"rotate": "user", "bind": "2001:db8::/64"},
            },
        ),
    ],
)
def test_forms_of_a_url(text: str, upstream: object) -> None:
    config = converted("url", text).config
    assert config["upstreams"] == {config["default"]: upstream}


@pytest.mark.parametrize(
    "text",
    [
        "http://192.0.2.1:80,socks5://192.0.2.2:1080",
        "http://192.0.2.1:80 socks5://192.0.2.2:1080",
        "http://192.0.2.1:80 -> socks5://192.0.2.2:1080",
        "http://192.0.2.1:80 , socks5://192.0.2.2:1080",
    ],
)
def test_urls_of_a_line_are_a_chain(text: str) -> None:
    config = converted("url", text).config
    assert config["upstreams"]["chain"] == ["192.0.2.1", "192.0.2.2"]
    assert config["default"] == "chain"


def test_several_lines_are_a_group_with_their_labels() -> None:
    text = "# mine\nhttp://192.0.2.1:80#Fast%20one\n\nsocks5://192.0.2.2:1080\n"
    config = converted("url", text).config
    assert config["upstreams"]["pool"] == {"members": ["Fast-one", "192.0.2.2"]}
    assert config["default"] == "pool"


@pytest.mark.parametrize(
    "text", ["ss://YWVzOnMzY3JldA@192.0.2.1:8388", "vmess://s3cret", "socks5://bob@192.0.2.1:1080"]
)
def test_url_that_cannot_be_an_upstream_blocks_and_is_told(text: str) -> None:
    result = converted("url", text)
    assert result.config["default"] == "block"
    assert len(result.lost) == 1
    assert "s3cret" not in "".join(why for _, why in result.lost)


def test_text_without_a_url_is_refused() -> None:
    with pytest.raises(ConversionError):
        converted("url", "# nothing\n")


@pytest.mark.parametrize(
    "text", ["https://t.me/socks?server=192.0.2.1&port=1080", "http://wpad.example/proxy.pac"]
)
def test_url_with_a_path_is_no_proxy(text: str) -> None:
    result = converted("url", text)
    assert result.config["default"] == "block" and "it has a path" in result.lost[0][1]


@pytest.mark.parametrize("option", ["udp=false", "timeout=soon", "mark=x", "bind=nowhere:"])
def test_option_with_a_wrong_value_is_not_carried(option: str) -> None:
    result = converted("url", f"socks5://192.0.2.1:1080?{option}&keepalive=30s")
    expected = {"url": "socks5://192.0.2.1:1080", "keepalive": "30s"}
    assert result.config["upstreams"] == {"192.0.2.1": expected}
    [(_, why)] = result.lost
    assert why.startswith(option.partition("=")[0])


def test_error_of_a_file_name_shows_no_login() -> None:
    with pytest.raises(ConversionError, match=r"^PROXY=http://\*\*\*@a:80: No such file"):
        read_source("PROXY=http://bob:s3cret@a:80")
