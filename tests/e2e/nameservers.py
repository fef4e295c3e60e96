"""Name servers as processes: unbound with names of its own, in clear and within TLS, and dnsdist, which speaks HTTPS, before it."""

from __future__ import annotations

import subprocess
from typing import NamedTuple

from tests.e2e.support import LOOPBACK, environment, program
from tests.e2e.upstreams import Programs
from tests.support.certificates import Certificates
from tests.support.ports import free_port

LONG = tuple(f"{at:02}" + "abcdefghij"[at % 10] * 250 for at in range(16))  # 4 KB of TXT
MIDDLE = LONG[:8]  # 2 KB
UNKNOWN = "C0000201FF00"

_UNBOUND = """
server:
  interface: {host}@{port}
  interface: {host}@{tls_port}
  tls-port: {tls_port}
  tls-service-key: "{certificates}/server.key"
  tls-service-pem: "{certificates}/server.pem"
  access-control: 127.0.0.0/8 allow
  username: ""
  chroot: ""
  directory: "{directory}"
  pidfile: ""
  use-syslog: no
  do-daemonize: no
  num-threads: 1
  module-config: "iterator"
  local-zone: "." static
  local-zone: "test." static
{data}
remote-control:
  control-enable: no
"""


class NameServers(NamedTuple):
    port: int
    tls_port: int
    https_port: int  # 0 without dnsdist


def records() -> list[str]:
    """What unbound knows, in the form of a zone file."""
    return [
        "test. 3600 IN SOA ns.test. root.test. 1 3600 600 86400 60",
        "www.test. 60 IN A 192.0.2.1",
        "www.test. 60 IN AAAA 2001:db8::1",
        "origin.test. 60 IN A 127.0.0.1",
        "big.test. 60 IN TXT " + " ".join(f'"{one}"' for one in LONG),
        "middle.test. 60 IN TXT " + " ".join(f'"{one}"' for one in MIDDLE),
        f"odd.test. 60 IN TYPE65280 \\# {len(UNKNOWN) // 2} {UNKNOWN}",
        *(
            f"{name}.test. 60 IN A 192.0.2.{at}"
            for at, name in enumerate(("udp", "tcp", "dot", "doh", "far", "wrong"), 10)
        ),
        "ads.test. 60 IN A 192.0.2.66",
    ]


def start(programs: Programs, certificates: Certificates) -> NameServers:
    port, tls_port = free_port(), free_port()
    data = "\n".join(f"  local-data: '{record}'" for record in records())
    config = programs.write(
        "unbound.conf",
        _UNBOUND.format(
            host=LOOPBACK,
            port=port,
            tls_port=tls_port,
            certificates=certificates.directory,
            directory=programs.directory,
            data=data,
        ),
    )
    programs.start(port, program("unbound"), "-d", "-c", config)
    return NameServers(port, tls_port, 0)


def start_https(programs: Programs, certificates: Certificates, behind: int) -> int:
    """dnsdist before the name server on a port of this machine.  1.7 and 1.8 speak HTTP/1.1 and HTTP/2, later ones HTTP/2 alone."""
    port, plain = free_port(), free_port()
    config = programs.write(
        "dnsdist.conf",
        f"""
setLocal("{LOOPBACK}:{plain}")
newServer({{address="{LOOPBACK}:{behind}", healthCheckMode="up"}})
addDOHLocal("{LOOPBACK}:{port}", "{certificates.path("server.pem")}", "{certificates.path("server.key")}", "/dns-query")
setSecurityPollSuffix("")
""",
    )
    programs.start(port, program("dnsdist"), "--supervised", "--disable-syslog", "-C", config)
    return port


class Answer(NamedTuple):
    status: str  # NOERROR, NXDOMAIN ...
    flags: list[str]
    records: list[list[str]]  # of the answer: owner, TTL, class, kind, data
    text: str

    @property
    def data(self) -> list[str]:
        return [" ".join(record[4:]) for record in self.records]


def dig(port: int, *arguments: str, seconds: float = 20) -> Answer:
    """What dig makes of an answer; where there is none, `status` is empty."""
    done = subprocess.run(
        (
            program("dig"),
            f"@{LOOPBACK}",
            "-p",
            str(port),
            "+time=5",
            "+tries=1",
            "+nocookie",
            *arguments,
        ),
        capture_output=True,
        text=True,
        env=environment(HOME="/nonexistent"),
        timeout=seconds,
    )
    lines = done.stdout.splitlines()
    status = next(
        (line.partition("status: ")[2].partition(",")[0] for line in lines if "status: " in line),
        "",
    )
    flags = next(
        (
            line.partition("flags: ")[2].partition(";")[0].split()
            for line in lines
            if line.startswith(";; flags: ")
        ),
        [],
    )
    section = done.stdout.partition(";; ANSWER SECTION:\n")[2].partition("\n\n")[0]
    return Answer(
        status, flags, [line.split() for line in section.splitlines()], done.stdout + done.stderr
    )
