"""Runs as root in a booted Debian, in a container without a network: what the unit promises, tried.

Each step is a line "ok" or "FAILED"; the last line counts the failures.  Standard library only.
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
SECONDS = 20.0
PROXY = ("127.0.0.1", 1080)
PACKAGED = FILE.read_text()
failures = 0
origin: list[int] = []  # its ports, HTTP and DNS


def run(*command: str, status: int | None = 0) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert status is None or done.returncode == status, (
        f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    )
    return done.stdout.strip()


def show(name: str) -> str:
    return run("systemctl", "show", "-P", name, UNIT)


def pid() -> int:
    return int(show("MainPID"))


def eventually(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def drop_in(text: str) -> None:
    DROP_IN.parent.mkdir(exist_ok=True)
    DROP_IN.write_text(text)
    run("systemctl", "daemon-reload")


def greet(address: tuple[str, int] = PROXY) -> socket.socket:
    sock = socket.create_connection(address, SECONDS)
    sock.sendall(b"\5\1\0")
    assert sock.recv(2) == b"\5\0"
    return sock


def tunnel() -> socket.socket:
    """A connection through the proxy to a server of our own that answers nothing, and lives until we end it."""
    sock = greet()
    sock.sendall(b"\5\1\0\1\x7f\0\0\1" + origin[0].to_bytes(2, "big"))
    assert sock.recv(10)[1] == 0
    return sock


def fetches(proxy: str) -> None:
    page = run("curl", "-sS", "--max-time", "20", "-x", proxy, f"http://127.0.0.1:{origin[0]}/")
    assert page == "hello from the origin", page


def active() -> bool:
    return show("ActiveState") == "active"


def restart_clean() -> None:
    """The unit and the file as packaged."""
    DROP_IN.unlink(missing_ok=True)
    FILE.write_text(PACKAGED)
    run("systemctl", "daemon-reload")
    run("systemctl", "reset-failed", UNIT, status=None)
    run("systemctl", "restart", UNIT)


def associate() -> tuple[socket.socket, tuple[str, int]]:
    control = greet()
    control.sendall(b"\5\3\0\1\0\0\0\0\0\0")
    reply = control.recv(10)
    assert reply[1] == 0
    return control, (socket.inet_ntoa(reply[4:8]), int.from_bytes(reply[8:10], "big"))


def asks_dns(relay: tuple[str, int]) -> bytes:
    query = b"\x12\x34\1\0\0\1\0\0\0\0\0\0\3www\4test\0\0\1\0\1"
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        sock.settimeout(SECONDS)
        sock.sendto(b"\0\0\0\1\x7f\0\0\1" + origin[1].to_bytes(2, "big") + query, relay)
        return sock.recv(2000)


# --- the steps, in order


def started_at_boot() -> str:
    assert active() and show("Type") == "notify"
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
    most = min(65536, resource.getrlimit(resource.RLIMIT_NOFILE)[1])  # a container may have less
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
    fetches("socks5h://127.0.0.1:1080")
    fetches("http://127.0.0.1:1080")
    control, relay = associate()
    with control:
        assert asks_dns(relay).endswith(bytes([192, 0, 2, 7]))


def with_port(port: int, text: str = PACKAGED) -> str:
    """A configuration with a listener more."""
    more = f'  - {{protocol: sps, listen: "127.0.0.1:{port}", name: low}}'
    return text.replace("    listen: 127.0.0.1:1080", f"    listen: 127.0.0.1:1080\n{more}")


def reloads_when_it_has_reloaded() -> str:
    before = pid()
    with tunnel() as living:
        start = time.monotonic()
        for port in (*range(90, 80, -1), 80):
            FILE.write_text(with_port(port))
            run("systemctl", "reload", UNIT)
            greet(("127.0.0.1", port)).close()  # at once: the reload is over when systemctl says so
        seconds = (time.monotonic() - start) / 11
        living.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert b"hello" in b"".join(iter(lambda: living.recv(2000), b""))
    assert pid() == before and active()
    return f"{seconds * 1000:.0f} ms"


def keeps_all_at_a_faulty_reload() -> None:
    before = pid()
    good = FILE.read_text()
    FILE.write_text(good + "lisners: []\n")
    run("systemctl", "reload", UNIT, status=1)
    os.kill(before, signal.SIGHUP)  # without the check that the unit makes first
    eventually(lambda: "not reloaded" in show("StatusText"))
    assert pid() == before and active()
    greet(("127.0.0.1", 80)).close()
    FILE.write_text(good)
    run("systemctl", "reload", UNIT)
    assert "not reloaded" not in show("StatusText")


def reloads_without_a_control_socket() -> None:
    """By a signal, whose end systemd does not always wait for."""
    without = re.sub(r"^control:.*$", "", PACKAGED, flags=re.M)
    assert without != PACKAGED
    FILE.write_text(without)
    run("systemctl", "restart", UNIT)
    before = pid()
    FILE.write_text(with_port(81, without))
    run("systemctl", "reload", UNIT)
    eventually(lambda: "127.0.0.1:81" in show("StatusText"))
    greet(("127.0.0.1", 81)).close()
    assert pid() == before and active()


def starts_again_after_a_crash() -> None:
    restart_clean()
    drop_in("[Service]\nRestartSec=100ms\n")
    before = pid()
    os.kill(before, signal.SIGKILL)
    eventually(lambda: active() and pid() not in (0, before))
    greet().close()


def answers_its_watchdog() -> None:
    drop_in("[Service]\nRestartSec=100ms\nWatchdogSec=1\n")
    run("systemctl", "restart", UNIT)
    before = pid()
    time.sleep(3)
    assert pid() == before and active(), "ended though it was well"


def is_restarted_by_its_watchdog() -> None:
    before = pid()
    os.kill(before, signal.SIGSTOP)
    eventually(lambda: active() and pid() not in (0, before))
    greet().close()
    log = run("journalctl", "-b", "-o", "cat", "-u", UNIT)
    assert "Watchdog timeout" in log and "Fatal Python error: Aborted" in log and "in _wait" in log


def a_faulty_file_is_78_and_no_loop() -> None:
    restart_clean()
    drop_in("[Service]\nRestartSec=100ms\n")
    FILE.write_text("lisners: []\n")
    run("systemctl", "restart", UNIT, status=1)
    time.sleep(1)
    assert (show("ActiveState"), show("ExecMainStatus"), show("NRestarts")) == ("failed", "78", "0")
    assert "netproxyd.yaml:1:1" in run("journalctl", "-b", "-o", "cat", "-u", UNIT)


def a_port_in_use_is_tried_again() -> None:
    restart_clean()
    drop_in("[Service]\nRestartSec=100ms\n")
    run("systemctl", "stop", UNIT)
    with socket.create_server(PROXY):
        run("systemctl", "start", UNIT, status=1)
        eventually(lambda: int(show("NRestarts")) > 0)
    eventually(active)
    greet().close()


def drains_as_long_as_it_needs() -> str:
    restart_clean()
    drop_in("[Service]\nTimeoutStopSec=1\nWatchdogSec=1\n")
    FILE.write_text(PACKAGED + "timeouts: {drain: 20s}\n")
    run("systemctl", "restart", UNIT)
    with tunnel() as living:
        stopping = subprocess.Popen(["systemctl", "stop", UNIT])
        eventually(lambda: show("ActiveState") == "deactivating")
        time.sleep(3)  # thrice what the unit allows, of either
        assert stopping.poll() is None
        assert "stopping" in show("StatusText"), show("StatusText")
        living.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert b"hello" in b"".join(iter(lambda: living.recv(2000), b""))
    assert stopping.wait(SECONDS) == 0
    assert (show("Result"), show("ExecMainStatus")) == ("success", "0")
    return "3 s with TimeoutStopSec=1 and WatchdogSec=1"


def takes_sockets_of_systemd() -> None:
    restart_clean()
    run("systemctl", "stop", UNIT)
    Path("/etc/systemd/system/netproxyd.socket").write_text(
        Path("/try/netproxyd.socket").read_text()
    )
    # our origin is on this machine, to which strangers are not led
    FILE.write_text(Path("/try/socket.yaml").read_text() + "destinations: {allow: [127.0.0.0/8]}\n")
    drop_in(
        "[Unit]\nStartLimitIntervalSec=0\n[Service]\nCapabilityBoundingSet=\nAmbientCapabilities=\n"
    )
    run("systemctl", "start", "netproxyd.socket")
    assert not active()
    fetches("socks5h://127.0.0.1:1080")  # starts it
    assert active()
    control, relay = associate()
    with control:
        assert asks_dns(relay).endswith(bytes([192, 0, 2, 7]))
    assert f"CapEff:\t{0:016x}" in Path(f"/proc/{pid()}/status").read_text()
    run("systemctl", "reload", UNIT)
    fetches("http://127.0.0.1:1080")


def refuses_nobody_while_it_restarts() -> str:
    """Connections, one after the other on four threads, over five restarts: each is answered."""
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
        before, count = pid(), sum(served)
        run("systemctl", "restart", UNIT)
        assert pid() != before
        eventually(lambda: faults or sum(served) > count + 20)
    stop.set()
    for thread in threads:
        thread.join()
    assert not faults, faults
    control, relay = associate()
    with control:
        assert asks_dns(relay).endswith(bytes([192, 0, 2, 7]))
    return f"{sum(served)} connections, none refused"


def is_upgraded() -> None:
    run("systemctl", "stop", "netproxyd.socket", UNIT)
    Path("/etc/systemd/system/netproxyd.socket").unlink()
    restart_clean()
    FILE.write_text(PACKAGED + "# mine\n")
    before = pid()
    run("dpkg", "-i", "--force-confdef", "--force-confold", "/try/new.deb")
    assert active() and pid() != before
    assert FILE.read_text().endswith("# mine\n")
    fetches("socks5h://127.0.0.1:1080")


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
    reloads_when_it_has_reloaded,
    keeps_all_at_a_faulty_reload,
    reloads_without_a_control_socket,
    starts_again_after_a_crash,
    answers_its_watchdog,
    is_restarted_by_its_watchdog,
    a_faulty_file_is_78_and_no_loop,
    a_port_in_use_is_tried_again,
    drains_as_long_as_it_needs,
    takes_sockets_of_systemd,
    refuses_nobody_while_it_restarts,
    is_upgraded,
    is_removed_and_purged,
)


def main() -> None:
    global failures
    with subprocess.Popen(["/usr/bin/python3", "-I", "/try/origin.py", "/try/ports"]) as server:
        eventually(lambda: Path("/try/ports").exists())
        origin.extend(map(int, Path("/try/ports").read_text().split()))
        for step in STEPS:
            start = time.monotonic()
            try:
                more = step()
            except Exception:
                failures += 1
                print(f"FAILED: {step.__name__}\n{traceback.format_exc()}")
                continue
            print(
                f"ok: {step.__name__} ({time.monotonic() - start:.1f} s){': ' + more if more else ''}"
            )
        server.terminate()
    print(f"{failures} failures")


main()
