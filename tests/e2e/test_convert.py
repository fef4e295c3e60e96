"""An old proxy and netproxyd with the converted file decide the same about the same flows."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from netproxy.ctl.convert.draft.draft import UNUSABLE_HASH
from tests.e2e.support import SECONDS, program
from tests.e2e.verdicts import DIRECT, OLD_PORT, REFUSED, THROUGH, Ask, Rig, asks, rig

pytestmark = [pytest.mark.e2e, pytest.mark.any_workers]
pytest.importorskip("yaml")

BOB = "bob:secret"
STRANGER = Ask("http", "10.9.1.1:80", "10.9.2.9", "bob:wrong")
"""A login that is wrong, from an address of its own: the next login of the address is delayed."""

TINYPROXY = f"""
User root
Group root
Port {OLD_PORT}
Allow 10.9.0.1
Deny 10.9.3.0/24
Allow 10.9.0.0/16
BasicAuth {BOB.replace(":", " ")}
ConnectPort 443
ConnectPort 563
Filter "DIRECTORY/filter"
FilterType ere
Timeout 30
Upstream socks5 10.9.9.1:3128 ".onion.example"
Upstream http 10.9.9.1:3128 "10.9.7.0/24"
Upstream http 10.9.9.1:3128 "inside.example"
Upstream none "."
"""
FILTER = "^ads\\.example$\n\\.ads\\.example$\n^adserver[0-9]\n"

DANTE = f"""
logoutput: stderr
internal: 0.0.0.0 port = {OLD_PORT}
external: 10.9.0.1
clientmethod: none
socksmethod: username none
user.privileged: root
user.unprivileged: nobody
client block {{ from: 10.9.3.0/24 to: 0.0.0.0/0 }}
client pass {{ from: 10.9.0.0/16 to: 0.0.0.0/0 }}
socks block {{ from: 0.0.0.0/0 to: 10.9.8.0/24 }}
socks block {{ from: 0.0.0.0/0 to: ads.example }}
socks block {{ from: 0.0.0.0/0 to: 0.0.0.0/0 port = 25 }}
socks pass {{ from: 10.9.2.0/24 to: .onion.example port = https
    socksmethod: username
    user: bob
}}
socks block {{ from: 0.0.0.0/0 to: .onion.example }}
socks pass {{ from: 10.9.4.0/24 to: 10.9.1.0/24 port 80-443 command: connect }}
socks pass {{ from: 10.9.4.0/24 to: 10.9.1.0/24 port = 53 protocol: udp }}
socks block {{ from: 10.9.4.0/24 to: 0.0.0.0/0 }}
socks pass {{ from: 10.9.2.0/24 to: 0.0.0.0/0 port ge 1024
    protocol: tcp
    socksmethod: username
}}
socks block {{ from: 10.9.5.0/24 to: 0.0.0.0/0 command: bind }}
socks pass {{ from: 10.9.0.0/16 to: 0.0.0.0/0 port != 8080 command: connect bind udpassociate }}
socks pass {{ from: 10.9.1.0/24 to: 10.9.0.0/16 command: bindreply udpreply }}
"""
ROUTES = """
route { from: 0/0 to: 10.9.0.0/18 via: direct
    command: connect bind udpassociate
}
route { from: 10.9.0.0/16 to: 0.0.0.0/0 via: 10.9.9.1 port = 3128
    proxyprotocol: socks_v5
    command: connect
}
"""


THREEPROXY = f"""
users bob:CL:secret "ann:CL:other word"
internal 10.9.0.1
external 10.9.0.1
auth AUTH
deny * 10.9.3.0/24
deny * * 10.9.8.0/24
deny * * ads.example,*.onion.example,*server7*
deny * * * 25
allow * 10.9.2.0-10.9.2.255 10.9.7.0/24
parent 1000 socks5 10.9.9.1 3128
allow bob,ann 10.9.2.0/24 * 1-1023 CONNECT,UDPASSOC,HTTP,HTTPS
allow * 10.9.4.0/24 10.9.1.0/24 80,443
allow * 10.9.5.0/24 * * BIND
SERVICE -p{OLD_PORT} -n
"""
REDSOCKS = f"""
base {{
    log_info = on;
    log = stderr;
    daemon = off;
    redirector = iptables;
}}
redsocks {{
    local_ip = 127.0.0.1;
    local_port = {OLD_PORT};
    ip = 10.9.9.1;
    port = 3128;
    type = KIND;
}}
"""


SQUID = f"""
http_port {OLD_PORT}
acl local src 10.9.2.0/24
acl guests src 10.9.4.0-10.9.4.255
acl banned src 10.9.3.0/24
acl SSL_ports port 443 563
acl Safe_ports port 80 443 563 8080 25
acl ads dstdomain -n .ads.example
acl robots dstdom_regex -n ^adserver[0-9]
acl inside dst 10.9.5.0/24
acl onion dstdomain -n .onion.example
acl far dst 10.9.7.0/24
auth_param basic program HELPER PASSWORDS
auth_param basic children 2
acl bob proxy_auth bob
acl anybody proxy_auth REQUIRED
acl purge method PURGE
acl stats proto cache_object
http_access deny stats
http_access deny purge
http_access deny !Safe_ports
http_access deny CONNECT !SSL_ports
http_access deny ads
http_access deny robots
http_access deny banned
http_access allow guests !onion !far
http_access deny inside !bob
http_access allow local anybody
http_access deny all
cache_peer 10.9.9.1 parent 3128 0 no-query no-digest
cache_peer_access 10.9.9.1 allow onion
cache_peer_access 10.9.9.1 allow far
cache_peer_access 10.9.9.1 deny all
never_direct allow onion
never_direct allow far
cache deny all
access_log none
cache_log /dev/null
pid_filename none
pinger_enable off
coredump_dir none
shutdown_lifetime 1 second
cache_effective_user nobody
"""
HELPER = Path("/usr/lib/squid/basic_ncsa_auth")


def hashed(openssl: str, kind: str) -> str:
    """Return the hash of bob's password."""
    command = [openssl, "passwd", kind, "secret"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    return done.stdout.strip()


def compare(net: Rig, flows: list[Ask], kinds: set[str]) -> None:
    """Compare the verdicts; all kinds of verdicts must be among them."""
    old = net.verdicts(flows, OLD_PORT)
    counts = Counter(old)
    print(f"asked {len(flows)}: {dict(counts)}")
    assert net.differences(flows, old) == []
    assert set(counts) == kinds


def test_tinyproxy_and_its_conversion_decide_the_same(tmp_path: Path) -> None:
    path = program("tinyproxy")
    (tmp_path / "filter").write_text(FILTER)
    config = tmp_path / "tinyproxy.conf"
    config.write_text(TINYPROXY.replace("DIRECTORY", str(tmp_path)))
    targets = [
        *("10.9.1.1:80", "10.9.1.1:443", "10.9.1.1:25", "www.allowed.example:443"),
        *("ads.example:80", "www.ads.example:443", "adserver7.example:443", "intranet:443"),
        *("far.onion.example:443", "10.9.7.7:443", "inside.example:80", "inside.example:443"),
    ]
    flows = asks(["http", "connect"], targets, ["10.9.2.1"], [BOB])
    flows += asks(["http", "connect"], targets[:2], ["10.9.2.1", "10.9.3.1"], [BOB, ""])
    with rig(tmp_path) as net:
        net.start(OLD_PORT, path, "-d", "-c", str(config), log="old")
        net.convert("tinyproxy", str(config))
        compare(net, [*flows, STRANGER], {DIRECT, THROUGH, REFUSED})


@pytest.mark.parametrize("routes", ["", ROUTES], ids=["rules", "routes"])
def test_danted_and_its_conversion_decide_the_same(tmp_path: Path, routes: str) -> None:
    path, openssl = program("danted"), program("openssl")
    # A user of the system, which only the daemons in the namespace know.
    for name, line in (
        ("passwd", "bob:x:4711:4711::/:/bin/false"),
        ("shadow", f"bob:{hashed(openssl, '-6')}:1::::::"),
    ):
        (tmp_path / name).write_text(f"{(Path('/etc') / name).read_text()}{line}\n")
    config = tmp_path / "danted.conf"
    config.write_text(DANTE + routes)
    flows = asks(
        ["socks5"],
        [
            *("10.9.1.1:80", "10.9.1.1:22", "10.9.1.1:25", "10.9.1.1:8080", "10.9.8.1:80"),
            *("ads.example:80", "far.onion.example:443", "far.onion.example:80"),
            *("10.9.77.7:443", "inside.example:443"),
        ],
        ["10.9.2.1", "10.9.4.1", "10.9.5.1"],
        [BOB, ""],
    )
    flows += asks(["socks4"], ["10.9.1.1:80", "10.9.1.1:25"], ["10.9.2.1", "10.9.3.1"], [""])
    flows += asks(["bind"], ["10.9.1.1:80", "10.9.5.1:22"], ["10.9.2.1", "10.9.5.1"], [""])
    flows += asks(["udp"], ["10.9.1.1:53", "10.9.5.1:53"], ["10.9.2.1", "10.9.4.1"], ["", BOB])
    with rig(tmp_path) as net:
        net.start(OLD_PORT, path, "-N", "1", "-f", str(config), log="old")
        net.convert("dante", str(config), lambda text: text.replace(UNUSABLE_HASH, "secret"))
        compare(
            net,
            [*flows, STRANGER._replace(how="socks5")],
            {DIRECT, REFUSED} | ({THROUGH} if routes else set()),
        )


@pytest.mark.parametrize("kind", ["socks5", "http-connect"])
def test_redsocks_and_its_conversion_lead_to_the_same_proxy(tmp_path: Path, kind: str) -> None:
    path = program("redsocks")
    config = tmp_path / "redsocks.conf"
    config.write_text(REDSOCKS.replace("KIND", kind))
    targets = ["10.9.1.1:80", "10.9.1.1:443", "10.9.7.7:80", "10.9.1.1:22"]
    with rig(tmp_path) as net:
        net.redirect()
        net.start(OLD_PORT, path, "-c", str(config), log="old")
        net.convert("redsocks", str(config))
        # What the kernel does not lead to the proxies goes its own way.
        compare(net, asks(["redirected"], targets, ["10.9.2.1"], [""]), {THROUGH, DIRECT})


def test_squid_and_its_conversion_decide_the_same(tmp_path: Path) -> None:
    path, openssl = program("squid"), program("openssl")
    if not HELPER.exists():
        pytest.skip(f"{HELPER} is not installed")
    targets = [
        *("10.9.1.1:80", "10.9.1.1:443", "10.9.1.1:22", "10.9.1.1:8080", "10.9.1.1:563"),
        *("www.allowed.example:80", "ads.example:80", "www.ads.example:443"),
        *("adserver7.example:80", "inside.example:80", "10.9.5.1:443"),
        *("far.onion.example:80", "far.onion.example:443", "10.9.7.7:443"),
    ]
    flows = asks(["http", "connect"], targets, ["10.9.2.1"], [BOB, ""])
    flows += asks(["http", "connect"], targets, ["10.9.4.1"], [""])
    flows += asks(["http", "connect"], targets[:2], ["10.9.3.1"], ["", BOB])
    with contextlib.ExitStack() as stack:
        # The helper runs as another user, who cannot read the directory of the test.
        passwords = stack.enter_context(tempfile.NamedTemporaryFile("w", prefix="netproxy-"))
        passwords.write(f"bob:{hashed(openssl, '-apr1')}\n")
        passwords.flush()
        os.fchmod(passwords.fileno(), 0o644)
        config = tmp_path / "squid.conf"
        text = SQUID.replace("HELPER", str(HELPER)).replace("PASSWORDS", passwords.name)
        config.write_text(text)
        name = f"netproxy{os.getpid()}"
        stack.callback(lambda: [left.unlink() for left in Path("/dev/shm").glob(f"{name}-*")])
        net = stack.enter_context(rig(tmp_path))
        net.start(OLD_PORT, path, "-N", "-n", name, "-f", str(config), log="old")
        net.convert("squid", str(config))
        compare(net, [*flows, STRANGER], {DIRECT, THROUGH, REFUSED})


@pytest.mark.parametrize("service", ["socks", "proxy"])
@pytest.mark.parametrize("auth", ["strong", "iponly"])
def test_3proxy_and_its_conversion_decide_the_same(tmp_path: Path, service: str, auth: str) -> None:
    path = shutil.which("3proxy")
    if path is None:
        pytest.skip("Debian has no 3proxy")
    config = tmp_path / "3proxy.cfg"
    config.write_text(THREEPROXY.replace("AUTH", auth).replace("SERVICE", service))
    targets = [
        *("10.9.1.1:80", "10.9.1.1:443", "10.9.1.1:25", "10.9.1.1:8080", "10.9.8.1:80"),
        *("ads.example:80", "far.onion.example:443", "adserver7.example:80", "10.9.7.7:443"),
        *("inside.example:80", "www.allowed.example:443"),
    ]
    logins = [BOB, "ann:other word", ""] if auth == "strong" else [""]
    hows = ["socks5"] if service == "socks" else ["http", "connect"]
    flows = asks(hows, targets, ["10.9.2.1", "10.9.3.1", "10.9.4.1"], logins)
    if service == "socks":
        flows += asks(["udp"], ["10.9.1.1:53", "10.9.8.1:53"], ["10.9.2.1"], logins)
    with rig(tmp_path) as net:
        net.start(OLD_PORT, path, str(config), log="old")
        net.convert("3proxy", str(config))
        compare(net, flows, {DIRECT, THROUGH, REFUSED})
