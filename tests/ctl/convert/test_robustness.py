"""Files that are cut or nonsense: converted, or refused with one line, never a traceback."""

from __future__ import annotations

import random
import re

import pytest


from netproxy.ctl.convert.registry import FORMATS
from netproxy.errors import ConfigError
from netproxy.ctl.convert.source import ConversionError
from tests.ctl.convert.converting import converted

WORDS = (
    *("0", "80", "-1", "99999", "1-2", "2-1", "10.0.0.0/8", "::1", "fe80::/10", "0/0", "a.example"),
    *(
        ".b.example",
        "*",
        "yes",
        "no",
        '"x y"',
        '"',
        "{",
        "}",
        "=",
        "port",
        ":",
        "/",
        "!",
        "a:b@c:1",
    ),
    *("none", "all", "http", "socks5", "direct", "eth99", "lo", "é", "${HOME}", "~", ""),
)
# Words that mean something, by format: those of the tests of the format.
KEYS = {
    "dante": "internal: external: socksmethod: client pass { socks block } from: to: port command: "
    "udpreply connect bind username user: joe route via: timeout.io: log: protocol: udp lo",
    "redsocks": "base { redsocks { redudp { dnstc { dnsu2t { } ; = local_ip local_port ip port "
    "login log log_debug splice dest_ip dest_port udp_timeout_stream remote_ip socks4",
    "frp": "[[proxies]] [common] [x] [proxies.plugin] name= type= serverAddr= bindPort= = [ ] "
    "{ localPort= remotePort= allowPorts= auth.token= customDomains= server_addr= remote_port= #",
    "3proxy": "auth iponly strong allow deny flush parent users proxy socks tcppm udppm dnspr -p80 "
    "internal external maxconn bandlimin connlim countall nserver nsrecord timeouts bob:CL:x bob "
    "1000 socks5 connect+ CONNECT HTTP -i127.0.0.1 ssl_serv ssl_server_cert",
    "gost": "-L http://bob:pw@:8080 socks5://:1080?udp=true tcp://:80/a.example:80 -F bypass= "
    "https://192.0.2.1:443?strategy=hash rtcp://:22/:22 dns://:53/1.1.1.1 red://:1 ?admission= -- "
    "http://:81?whitelist=tcp:*:80&blacklist=*:*:* -D -metrics udp://:1-3/:5-9 relay+tls://a:1 \\",
    "goproxy": "http socks sps tcp udp dns bridge server client -t tls -p :80 -P 192.0.2.1:80 -T "
    "-a bob:pw -A --stop str://a,*.b --only --ip-allow -r :80@[k]:81 --k --lb-method weight -q -S "
    "--udp-port -B --bind-ip eth0:80 --jumper socks5://192.0.2.9:1080 -l 1M --redir \\",
    "url": "socks5://bob:pw@a.example:1080 http://192.0.2.1:80 -> , https:// ://x #x ss://x@b:1 "
    "socks4://x@[::1]:1?udp=uot&tls.ca=x&x",
    "squid": "acl http_access http_port https_port cache_peer cache_peer_access never_direct "
    "src dst dstdomain port time proxy_auth allow deny all CONNECT parent auth_param maxconn "
    "tcp_outgoing_address delay_class dns_nameservers connect_timeout name=x workers",
    "tinyproxy": "Port Listen Allow Deny BasicAuth ConnectPort Filter Upstream Timeout MaxClients "
    "LogLevel Bind BindSame FilterURLs Anonymous ErrorFile",
}
START = {"gost": "gost -L :8080 ", "goproxy": "proxy "}
"""What each line begins with, where the commands of a program are lines."""


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("seed", range(40))
def test_nonsense_is_converted_or_refused(form: str, seed: int) -> None:
    chance = random.Random(seed)
    keys = KEYS[form].split()
    lines = []
    for _ in range(chance.randint(1, 25)):
        pool = (*WORDS, *keys)
        lines.append(" ".join([chance.choice(keys), *chance.choices(pool, k=chance.randint(0, 5))]))
        lines[-1] = START.get(form, "") + lines[-1]
    text = "\n".join(lines) + ("\nPort 1" if form == "tinyproxy" else "")
    try:
        result, _, notes = converted(form, text)
    except ConversionError as error:
        assert "\n" not in str(error)
        return
    except ConfigError as error:
        # The old program would have failed as well.
        assert all("is already used by" in line for line in str(error).splitlines()), error
        return
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", result)
    assert sum(notes.counts().values()) == len(notes.directives)
