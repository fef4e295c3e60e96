"""Runs name servers as processes, and queries with dig.

unbound serves its own names in plain text and in TLS. dnsdist serves HTTPS and forwards to unbound.
"""

from __future__ import annotations

import subprocess
from typing import NamedTuple

from tests.e2e.support import LOOPBACK, environment, program
from tests.e2e.upstreams import Programs
from tests.support.certificates import Certificates
from tests.support.ports import free_port
from tests.support.sockets import SECONDS

# TXT data of 4 and 2 KB.
LONG = tuple(f"{at:02}" + "abcdefghij"[at % 10] * 250 for at in range(16))
MIDDLE = LONG[:8]
# Data of a record whose type no program knows.
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
    """The ports of unbound."""

    port: int
    tls_port: int


def records() -> list[str]:
    """Return the records of unbound in the form of a zone file."""
    return [
        "test. 3600 IN SOA ns.test. root.test. 1 3600 600 86400 60",
        "www.test. 60 IN A 192.0.2.1",
        "www.test. 60 IN AAAA 2001:db8::1",
        "origin.test. 60 IN A 127.0.0.1",
        "big.test. 60 IN TXT " + " ".join(f'"{text}"' for text in LONG),
        "middle.test. 60 IN TXT " + " ".join(f'"{text}"' for text in MIDDLE),
        f"odd.test. 60 IN TYPE65280 \\# {len(UNKNOWN) // 2} {UNKNOWN}",
        *(
            f"{name}.test. 60 IN A 192.0.2.{at}"
            for at, name in enumerate(("udp", "tcp", "dot", "doh", "far", "wrong"), 10)
        ),
        "ads.test. 60 IN A 192.0.2.66",
    ]


def start(programs: Programs, certificates: Certificates) -> NameServers:
    """Start unbound. Skip the test if it is not installed."""
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
    return NameServers(port, tls_port)


def start_https(programs: Programs, certificates: Certificates, behind: int) -> int:
    """Start dnsdist in front of the name server on the port `behind`. Return its HTTPS port.

    dnsdist 1.7 and 1.8 speak HTTP/1.1 and HTTP/2, later versions only HTTP/2.
    """
    port, plain = free_port(), free_port()
    certificate, key = certificates.path("server.pem"), certificates.path("server.key")
    config = programs.write(
        "dnsdist.conf",
        f"""
setLocal("{LOOPBACK}:{plain}")
newServer({{address="{LOOPBACK}:{behind}", healthCheckMode="up"}})
addDOHLocal("{LOOPBACK}:{port}", "{certificate}", "{key}", "/dns-query")
setSecurityPollSuffix("")
""",
    )
    programs.start(port, program("dnsdist"), "--supervised", "--disable-syslog", "-C", config)
    return port


class Answer(NamedTuple):
    """What dig prints of an answer."""

    status: str
    """NOERROR, NXDOMAIN and so on; "" without an answer."""
    flags: list[str]
    records: list[list[str]]
    """The answer section: owner, TTL, class, type and data of each record."""
    text: str
    """The whole output."""

    @property
    def data(self) -> list[str]:
        """The data of each record."""
        return [" ".join(record[4:]) for record in self.records]


def dig(port: int, *arguments: str, seconds: float = SECONDS) -> Answer:
    """Run dig with these arguments against a port of loopback."""
    process = subprocess.run(
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
    lines = process.stdout.splitlines()
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
    section = process.stdout.partition(";; ANSWER SECTION:\n")[2].partition("\n\n")[0]
    answers = [line.split() for line in section.splitlines()]
    return Answer(status, flags, answers, process.stdout + process.stderr)
