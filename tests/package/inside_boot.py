"""Checks the systemd unit. Runs as root in a booted Debian, in a container without a network.

Prints a line "ok" or "FAILED" for each step; the last line counts the failures. Needs only the
standard library.
"""

import os
import re
import resource
import signal
import socket
import subprocess
import threading
import time
import traceback
from pathlib import Path
from typing import Any, Callable

UNIT = "netproxyd.service"
FILE = Path("/etc/netproxy/netproxyd.yaml")
DROP_IN = Path(f"/etc/systemd/system/{UNIT}.d/try.conf")
# The limit of a wait.
SECONDS = 60.0
PROXY = ("127.0.0.1", 1080)
PACKAGED = FILE.read_text()
failures = 0
# Ports of the origin: HTTP and DNS.
origin: list[int] = []


def run(*command: str, status: int | None = 0) -> str:
    """Run a command that must end with the status, or with any if that is None."""
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert status is None or process.returncode == status, (
        f"{command}: {process.returncode}\n{process.stdout}{process.stderr}"
    )
    return process.stdout.strip()


def show(name: str) -> str:
    """Return a property of the unit."""
    return run("systemctl", "show", "-P", name, UNIT)


def pid() -> int:
    """Return the process id of the daemon."""
    return int(show("MainPID"))


def wait_until(condition: Callable[[], Any]) -> None:
    """Wait until the condition is true."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.05)


def drop_in(text: str) -> None:
    """Add a configuration to the unit."""
    DROP_IN.parent.mkdir(exist_ok=True)
    DROP_IN.write_text(text)
    run("systemctl", "daemon-reload")


def greet(address: tuple[str, int] = PROXY) -> socket.socket:
    """Return a connection whose SOCKS5 greeting was answered."""
    sock = socket.create_connection(address, SECONDS)
    sock.sendall(b"\5\1\0")
    assert sock.recv(2) == b"\5\0"
    return sock


def tunnel() -> socket.socket:
    """Return a connection through the proxy to the origin, which waits for a request."""
    sock = greet()
    sock.sendall(b"\5\1\0\1\x7f\0\0\1" + origin[0].to_bytes(2, "big"))
    assert sock.recv(10)[1] == 0
    return sock


def fetch(proxy: str) -> None:
    """Load a page of the origin through the proxy."""
    page = run("curl", "-sS", "--max-time", "20", "-x", proxy, f"http://127.0.0.1:{origin[0]}/")
    assert page == "hello from the origin", page


def is_active() -> bool:
    """Return True if the unit is active."""
    return show("ActiveState") == "active"


def restart_clean() -> None:
    """Restart the daemon with the packaged unit and configuration."""
    DROP_IN.unlink(missing_ok=True)
    FILE.write_text(PACKAGED)
    run("systemctl", "daemon-reload")
    run("systemctl", "reset-failed", UNIT, status=None)
    run("systemctl", "restart", UNIT)


def associate() -> tuple[socket.socket, tuple[str, int]]:
    """Send UDP ASSOCIATE. Return the control connection and the relay's address."""
    control = greet()
    control.sendall(b"\5\3\0\1\0\0\0\0\0\0")
    reply = control.recv(10)
    assert reply[1] == 0
    return control, (socket.inet_ntoa(reply[4:8]), int.from_bytes(reply[8:10], "big"))


def query_dns(relay: tuple[str, int]) -> bytes:
    """Send a DNS query through the relay. Return the answer."""
    query = b"\x12\x34\1\0\0\1\0\0\0\0\0\0\3www\4test\0\0\1\0\1"
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        sock.settimeout(SECONDS)
        sock.sendto(b"\0\0\0\1\x7f\0\0\1" + origin[1].to_bytes(2, "big") + query, relay)
        return sock.recv(2000)


# --- the steps, in order


def started_at_boot() -> str:
    assert is_active() and show("Type") == "notify"
    assert "serves" in show("StatusText"), show("StatusText")
    return show("StatusText")


def runs_unprivileged() -> str:
    status = Path(f"/proc/{pid()}/status").read_text()
    assert os.stat(f"/proc/{pid()}").st_uid == int(run("id", "-u", "_netproxy"))
    for name in ("CapEff", "CapBnd", "CapPrm"):
        assert re.search(rf"^{name}:\s+0000000000000400$", status, re.M), name
    assert re.search(r"^NoNewPrivs:\s+1$", status, re.M) and re.search(
        r"^Seccomp:\s+2$", status, re.M
    )
    files = re.search(r"^Max open files\s+(\d+)", Path(f"/proc/{pid()}/limits").read_text(), re.M)
    # A container may have fewer.
    most = min(65536, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    assert files and int(files[1]) >= most, files
    resident = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.M)
    assert resident
    return f"idle: {resident[1]} KiB resident, {files[1]} descriptors"


def is_hardened() -> str:
    line = run("systemd-analyze", "security", "--no-pager", UNIT).splitlines()[-1]
    level = re.search(r"(\d+\.\d)", line)
    assert level and float(level[1]) <= 1.8, line
    return f"exposure {level[1]}"


def serves_tcp_and_udp() -> None:
    fetch("socks5h://127.0.0.1:1080")
    fetch("http://127.0.0.1:1080")
    control, relay = associate()
    with control:
        assert query_dns(relay).endswith(bytes([192, 0, 2, 7]))


def with_port(port: int, text: str = PACKAGED) -> str:
    """Return the configuration with one more listener."""
    return (
        text
        + "listeners:\n  - {protocol: sps, listen: 127.0.0.1:1080}\n"
        + f'  - {{protocol: sps, listen: "127.0.0.1:{port}", name: low}}\n'
    )


def reload_ends_when_the_daemon_has_reloaded() -> str:
    """A new port is open as soon as systemctl returns; connections continue."""
    before = pid()
    with tunnel() as living:
        start = time.monotonic()
        for port in (*range(90, 80, -1), 80):
            FILE.write_text(with_port(port))
            run("systemctl", "reload", UNIT)
            greet(("127.0.0.1", port)).close()
        seconds = (time.monotonic() - start) / 11
        living.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert b"hello" in b"".join(iter(lambda: living.recv(2000), b""))
    assert pid() == before and is_active()
    return f"{seconds * 1000:.0f} ms"


def faulty_reload_changes_nothing() -> None:
    before = pid()
    good = FILE.read_text()
    FILE.write_text(good + "lisners: []\n")
    run("systemctl", "reload", UNIT, status=1)
    # Without the check that the unit makes first.
    os.kill(before, signal.SIGHUP)
    wait_until(lambda: "not reloaded" in show("StatusText"))
    assert pid() == before and is_active()
    greet(("127.0.0.1", 80)).close()
    FILE.write_text(good)
    run("systemctl", "reload", UNIT)
    assert "not reloaded" not in show("StatusText")


def reloads_without_a_control_socket() -> None:
    """The unit sends a signal. Not every systemd waits for the end of the reload."""
    without = PACKAGED + "control: none\n"
    FILE.write_text(without)
    run("systemctl", "restart", UNIT)
    before = pid()
    FILE.write_text(with_port(81, without))
    run("systemctl", "reload", UNIT)
    wait_until(lambda: "127.0.0.1:81" in show("StatusText"))
    greet(("127.0.0.1", 81)).close()
    assert pid() == before and is_active()


def starts_again_after_a_crash() -> None:
    restart_clean()
    drop_in("[Service]\nRestartSec=100ms\n")
    before = pid()
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: is_active() and pid() not in (0, before))
    greet().close()


def answers_its_watchdog() -> None:
    drop_in("[Service]\nRestartSec=100ms\nWatchdogSec=1\n")
    run("systemctl", "restart", UNIT)
    before = pid()
    time.sleep(3)
    assert pid() == before and is_active(), "the watchdog has ended a healthy daemon"


def is_restarted_by_its_watchdog() -> None:
    before = pid()
    os.kill(before, signal.SIGSTOP)
    wait_until(lambda: is_active() and pid() not in (0, before))
    greet().close()
    log = run("journalctl", "-b", "-o", "cat", "-u", UNIT)
    assert "Watchdog timeout" in log and "Fatal Python error: Aborted" in log and "in _wait" in log


def faulty_file_is_status_78_without_restarts() -> None:
    restart_clean()
    drop_in("[Service]\nRestartSec=100ms\n")
    FILE.write_text("lisners: []\n")
    run("systemctl", "restart", UNIT, status=1)
    time.sleep(1)
    assert (show("ActiveState"), show("ExecMainStatus"), show("NRestarts")) == ("failed", "78", "0")
    assert "netproxyd.yaml:1:1" in run("journalctl", "-b", "-o", "cat", "-u", UNIT)


def port_in_use_is_tried_again() -> None:
    restart_clean()
    drop_in("[Service]\nRestartSec=100ms\n")
    run("systemctl", "stop", UNIT)
    with socket.create_server(PROXY):
        run("systemctl", "start", UNIT, status=1)
        wait_until(lambda: int(show("NRestarts")) > 0)
    wait_until(is_active)
    greet().close()


def drains_as_long_as_it_needs() -> str:
    restart_clean()
    drop_in("[Service]\nTimeoutStopSec=1\nWatchdogSec=1\n")
    FILE.write_text(PACKAGED + "timeouts: {drain: 20s}\n")
    run("systemctl", "restart", UNIT)
    with tunnel() as living:
        stopping = subprocess.Popen(["systemctl", "stop", UNIT])
        wait_until(lambda: show("ActiveState") == "deactivating")
        # Three times as long as the unit allows, for either.
        time.sleep(3)
        assert stopping.poll() is None
        assert "stopping" in show("StatusText"), show("StatusText")
        living.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert b"hello" in b"".join(iter(lambda: living.recv(2000), b""))
    assert stopping.wait(SECONDS) == 0
    assert (show("Result"), show("ExecMainStatus")) == ("success", "0")
    return "3 s with TimeoutStopSec=1 and WatchdogSec=1"


def serves_sockets_of_systemd() -> None:
    restart_clean()
    run("systemctl", "stop", UNIT)
    Path("/etc/systemd/system/netproxyd.socket").write_text(
        Path("/try/netproxyd.socket").read_text()
    )
    # The origin is on this machine, which clients of a public listener may not reach by default.
    FILE.write_text(Path("/try/socket.yaml").read_text() + "destinations: {allow: [127.0.0.0/8]}\n")
    drop_in(
        "[Unit]\nStartLimitIntervalSec=0\n[Service]\nCapabilityBoundingSet=\nAmbientCapabilities=\n"
    )
    run("systemctl", "start", "netproxyd.socket")
    assert not is_active()
    # Starts the daemon.
    fetch("socks5h://127.0.0.1:1080")
    assert is_active()
    control, relay = associate()
    with control:
        assert query_dns(relay).endswith(bytes([192, 0, 2, 7]))
    assert f"CapEff:\t{0:016x}" in Path(f"/proc/{pid()}/status").read_text()
    run("systemctl", "reload", UNIT)
    fetch("http://127.0.0.1:1080")


def restart_refuses_no_client() -> str:
    """Four threads connect again and again during five restarts. Each connection is answered."""
    stop = threading.Event()
    served, faults = [0] * 4, []

    def work(number: int) -> None:
        while not stop.is_set():
            try:
                greet().close()
                served[number] += 1
            except (OSError, AssertionError) as error:
                faults.append(repr(error))
                return

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(served))]
    for thread in threads:
        thread.start()
    for _ in range(5):
        before, wanted = pid(), sum(served) + 20
        run("systemctl", "restart", UNIT)
        assert pid() != before

        def is_served(wanted: int = wanted) -> bool:
            return bool(faults) or sum(served) > wanted

        wait_until(is_served)
    stop.set()
    for thread in threads:
        thread.join()
    assert not faults, faults
    control, relay = associate()
    with control:
        assert query_dns(relay).endswith(bytes([192, 0, 2, 7]))
    return f"{sum(served)} connections, none refused"


def is_upgraded() -> None:
    run("systemctl", "stop", "netproxyd.socket", UNIT)
    Path("/etc/systemd/system/netproxyd.socket").unlink()
    restart_clean()
    FILE.write_text(PACKAGED + "# mine\n")
    before = pid()
    run("dpkg", "-i", "--force-confdef", "--force-confold", "/try/new.deb")
    assert is_active() and pid() != before
    assert FILE.read_text().endswith("# mine\n")
    fetch("socks5h://127.0.0.1:1080")


def is_removed_and_purged() -> None:
    run("dpkg", "-r", "netproxyd")
    assert show("ActiveState") != "active" and FILE.exists()
    run("dpkg", "-P", "netproxyd")
    assert (
        not FILE.exists()
        and not Path("/var/lib/netproxy").exists()
        and not Path("/run/netproxy").exists()
    )
    assert UNIT not in run("systemctl", "list-unit-files")


STEPS = (
    started_at_boot,
    runs_unprivileged,
    is_hardened,
    serves_tcp_and_udp,
    reload_ends_when_the_daemon_has_reloaded,
    faulty_reload_changes_nothing,
    reloads_without_a_control_socket,
    starts_again_after_a_crash,
    answers_its_watchdog,
    is_restarted_by_its_watchdog,
    faulty_file_is_status_78_without_restarts,
    port_in_use_is_tried_again,
    drains_as_long_as_it_needs,
    serves_sockets_of_systemd,
    restart_refuses_no_client,
    is_upgraded,
    is_removed_and_purged,
)


def main() -> None:
    global failures
    with subprocess.Popen(["/usr/bin/python3", "-I", "/try/origin.py", "/try/ports"]) as server:
        wait_until(lambda: Path("/try/ports").exists())
        origin.extend(map(int, Path("/try/ports").read_text().split()))
        for step in STEPS:
            start = time.monotonic()
            try:
                result = step()
            except Exception:
                failures += 1
                print(f"FAILED: {step.__name__}\n{traceback.format_exc()}")
                continue
            seconds = time.monotonic() - start
            print(f"ok: {step.__name__} ({seconds:.1f} s){': ' + result if result else ''}")
        server.terminate()
    print(f"{failures} failures")


main()
