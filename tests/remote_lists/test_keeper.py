"""Lists that are fetched: whole, checked and readable ones replace the copy, and no others."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Callable, Iterator, Sequence

import pytest

from netproxy.daemon.checks.lists import count_entries
from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.services import DOMAINS, NETWORKS, FetchedPath, RemoteList
from netproxy.remote_lists import download, keeper
from netproxy.remote_lists.copies import remove_unused
from netproxy.remote_lists.download import DownloadError
from netproxy.remote_lists.keeper import ListKeeper
from tests.support.certificates import certificates
from tests.support.handlers import RecordingLog
from tests.support.sockets import SECONDS

DAY = 86400.0


class Site(ThreadingHTTPServer):
    """An HTTPS server of one list."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.body, self.status = b"one.example\n", 200
        self.headers: dict[str, str] = {}
        self.cut = 0
        """Bytes that are promised and not sent."""
        self.requests: list[str] = []
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        files = certificates().path("server.pem"), certificates().path("server.key")
        context.load_cert_chain(*files)
        self.socket = context.wrap_socket(self.socket, server_side=True)
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self.thread.start()

    @property
    def url(self) -> str:
        return f"https://localhost:{self.server_address[1]}/list.txt"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that does not trust the certificate, or has had enough, is no fault."""


class _Answer(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        site = self.server
        tag = self.headers.get("If-None-Match", "")
        site.requests.append(f"{self.path} {tag}".strip())
        status = 304 if tag and tag == site.headers.get("ETag") else site.status
        self.send_response(status)
        for name, value in site.headers.items():
            self.send_header(name, value)
        body = b"" if status == 304 else site.body
        self.send_header("Content-Length", str(len(body) + site.cut))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *values: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[Site]:
    server = Site()
    yield server
    server.shutdown()
    server.thread.join()
    server.server_close()


Keep = Callable[..., ListKeeper]


@pytest.fixture
def log() -> RecordingLog:
    return RecordingLog()


@pytest.fixture
def keep(log: RecordingLog) -> Iterator[Keep]:
    made: list[ListKeeper] = []

    def make(*lists: RemoteList) -> ListKeeper:
        made.append(ListKeeper(count_entries, log, certificates().client_context()))
        made[-1].configure(lists)
        return made[-1]

    yield make
    for each in made:
        each.stop()
        if each._thread is not None:
            each._thread.join(SECONDS)


def wanted(site: Site, folder: Path, kind: str = DOMAINS, sha256: str = "") -> RemoteList:
    return RemoteList(site.url, FetchedPath(folder / "lists" / "a"), kind, DAY, sha256)


def wait_for(look: Callable[[], object]) -> None:
    waiting = threading.Event()
    for _ in range(int(SECONDS / 0.01)):
        if look():
            return
        waiting.wait(0.01)
    raise AssertionError("not in time")


def said(log: RecordingLog, text: str) -> bool:
    return any(text in line for line in log.lines)


def test_list_is_fetched_and_told_once(
    site: Site, tmp_path: Path, keep: Keep, log: RecordingLog
) -> None:
    made = keep(item := wanted(site, tmp_path))
    wait_for(made.take_changed)
    assert Path(item.path).read_bytes() == site.body
    assert not made.take_changed()
    assert said(log, f"list {site.url}: fetched, 1 entries")
    assert list((tmp_path / "lists").iterdir()) == [Path(item.path)]


def test_young_copy_is_not_fetched_again(site: Site, tmp_path: Path, keep: Keep) -> None:
    item, other = wanted(site, tmp_path), tmp_path / "lists" / "b"
    other.parent.mkdir()
    Path(item.path).write_bytes(b"old.example\n")
    made = keep(item, item._replace(path=FetchedPath(other)))
    wait_for(made.take_changed)
    assert (len(site.requests), Path(item.path).read_bytes()) == (1, b"old.example\n")


def test_list_with_a_tag_is_not_sent_again(site: Site, tmp_path: Path, keep: Keep) -> None:
    site.headers = {"ETag": '"7"'}
    made = keep(item := wanted(site, tmp_path))
    wait_for(made.take_changed)
    copy = made._copies[item]
    assert copy.tag == '"7"'
    assert not made._fetch(copy)
    assert site.requests == ["/list.txt", '/list.txt "7"']


@pytest.mark.parametrize(
    ("body", "kind", "why"),
    [
        (b"one.example\n???\n", DOMAINS, "a.new:2"),
        (b"one.example\n", NETWORKS, "is not a valid network"),
        (b"<!DOCTYPE html>\n<html>", DOMAINS, "a.new:1"),
        (b"one.example\nkeyword:ads\n", DOMAINS, "'ads' is a keyword or an expression"),
        (b"regex:(a+)+b\n", DOMAINS, "'(a+)+b' is a keyword or an expression"),
    ],
)
def test_list_that_cannot_be_read_leaves_the_copy(
    site: Site, tmp_path: Path, keep: Keep, log: RecordingLog, body: bytes, kind: str, why: str
) -> None:
    """Hazard 164."""
    site.body = body
    made = keep(item := wanted(site, tmp_path, kind))
    wait_for(lambda: said(log, "the copy stays as it is"))
    assert said(log, why)
    assert not made.take_changed() and not list((tmp_path / "lists").iterdir())
    assert made._copies[item].failures == 1


def test_copy_that_was_removed_is_fetched_again(site: Site, tmp_path: Path, keep: Keep) -> None:
    site.headers = {"ETag": '"7"'}
    made = keep(item := wanted(site, tmp_path))
    wait_for(made.take_changed)
    Path(item.path).unlink()
    assert made._fetch(made._copies[item])
    assert Path(item.path).read_bytes() == site.body


def test_query_of_a_url_is_in_no_message(
    site: Site, tmp_path: Path, keep: Keep, log: RecordingLog
) -> None:
    """Hazard 111."""
    item = wanted(site, tmp_path)._replace(url=f"{site.url}?token=secret")
    wait_for(keep(item).take_changed)
    site.status = 500
    other = item._replace(path=FetchedPath(tmp_path / "lists" / "b"))
    keep(other)
    wait_for(lambda: said(log, "the copy stays as it is"))
    assert site.requests == ["/list.txt?token=secret"] * 2
    assert not said(log, "secret")


def test_other_checksum_leaves_the_copy_and_is_told(
    site: Site, tmp_path: Path, keep: Keep, log: RecordingLog
) -> None:
    made = keep(wanted(site, tmp_path, sha256="0" * 64))
    found = hashlib.sha256(site.body).hexdigest()
    wait_for(lambda: said(log, f"it has another checksum: sha256 {found}"))
    assert not made.take_changed()


def test_right_checksum_is_accepted(site: Site, tmp_path: Path, keep: Keep) -> None:
    made = keep(wanted(site, tmp_path, sha256=hashlib.sha256(site.body).hexdigest()))
    wait_for(made.take_changed)


def test_changed_checksum_of_the_configuration_is_checked_at_once(
    site: Site, tmp_path: Path, keep: Keep, log: RecordingLog
) -> None:
    """The copy is young: without the checksum it would be fetched a day later."""
    made = keep(item := wanted(site, tmp_path))
    wait_for(made.take_changed)
    right = item._replace(sha256=hashlib.sha256(site.body).hexdigest())
    made.configure([right])
    assert not said(log, "checksum") and len(site.requests) == 1
    site.body = b"two.example\n"
    other = item._replace(sha256=hashlib.sha256(site.body).hexdigest())
    made.configure([other])
    wait_for(made.take_changed)
    assert Path(item.path).read_bytes() == site.body and len(site.requests) == 2
    assert said(log, "the copy has another checksum than sha256 says")


def test_list_that_a_reload_has_removed_leaves_no_copy(
    site: Site, tmp_path: Path, keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is being fetched while the reload comes."""
    made = keep(item := wanted(site, tmp_path))
    wait_for(made.take_changed)
    copy = made._copies[item]
    Path(item.path).unlink()
    made.configure(())
    assert not made._fetch(copy)
    assert not list((tmp_path / "lists").iterdir())


def test_copies_that_no_rule_uses_are_removed(tmp_path: Path, log: RecordingLog) -> None:
    used, unused = f"{'a' * 16}-ads.txt", f"{'b' * 16}-ads.txt"
    item = RemoteList("https://x.example/ads.txt", FetchedPath(tmp_path / used), DOMAINS, DAY)
    kept = {used, f"{used}.new", "notes.txt"}
    for name in kept | {unused, f"{unused}.new"}:
        (tmp_path / name).touch()
    remove_unused(str(tmp_path), [item], log)
    assert {path.name for path in tmp_path.iterdir()} == kept
    assert said(log, f"removed {tmp_path}/{unused}: no rule uses this list any more")
    remove_unused(str(tmp_path / "none"), [item], log)


@pytest.mark.parametrize(
    ("body", "is_new"),
    [
        (b"a.example\n" * 20_000, False),
        (b"a.example\n" * 20_001, True),
        (b"a.example\n" * 19_999, True),
        (b"a.example\n" * 19_999 + b"b.example\n", True),
    ],
)
def test_only_another_content_is_a_new_copy(
    site: Site, tmp_path: Path, keep: Keep, body: bytes, is_new: bool
) -> None:
    """The list is longer than a piece of it."""
    site.body = b"a.example\n" * 20_000
    made = keep(item := wanted(site, tmp_path))
    wait_for(made.take_changed)
    site.body = body
    assert made._fetch(made._copies[item]) is is_new
    assert Path(item.path).read_bytes() == body


def test_reload_without_the_list_fetches_it_no_more(site: Site, tmp_path: Path, keep: Keep) -> None:
    made = keep(wanted(site, tmp_path))
    wait_for(made.take_changed)
    made.configure(())
    assert made._copies == {}


class TestDownload:
    def get(self, site: Site, folder: Path, tag: str = "") -> download.Download | None:
        context = certificates().client_context()
        return download.download(site.url, str(folder / "new"), tag, context)

    def fails(self, site: Site, folder: Path, why: str) -> None:
        with pytest.raises(DownloadError, match=why):
            self.get(site, folder)
        assert not (folder / "new").exists()

    def test_error_of_the_server_names_its_status(self, site: Site, tmp_path: Path) -> None:
        site.status = 503
        self.fails(site, tmp_path, "the server answers with status 503")

    def test_cut_list_is_an_error(self, site: Site, tmp_path: Path) -> None:
        site.cut = 5
        self.fails(site, tmp_path, "before the end|bytes read")

    def test_long_list_is_an_error(
        self, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(download, "BYTES_LIMIT", 8)
        self.fails(site, tmp_path, "the list has more than")

    def test_slow_list_is_an_error(
        self, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(download, "SECONDS_LIMIT", -1.0)
        self.fails(site, tmp_path, "takes more than")

    @pytest.mark.parametrize("sent", [b"HTTP/1.1 2", b"HTTP/1.1 200 OK\r\nServer: x"])
    def test_server_that_sends_byte_by_byte_is_given_up(
        self, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: bytes
    ) -> None:
        """Hazard 164.  The time of the whole download counts, not that of each byte."""
        monkeypatch.setattr(download, "SECONDS_LIMIT", 0.5)
        ended = threading.Event()

        def drip(answer: _Answer) -> None:
            answer.wfile.write(sent)
            # OSError: the client has gone.
            with contextlib.suppress(OSError):
                while not ended.wait(0.01):
                    answer.wfile.write(b"0")

        monkeypatch.setattr(_Answer, "do_GET", drip)
        try:
            self.fails(site, tmp_path, "takes more than")
        finally:
            ended.set()

    def test_name_server_that_is_silent_is_given_up(
        self, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Hazard 164.  getaddrinfo(3) has no deadline."""
        monkeypatch.setattr(download, "SECONDS_LIMIT", 0.2)
        may_answer, answered = threading.Event(), threading.Event()

        def getaddrinfo(*_: object, **__: object) -> list[object]:
            assert may_answer.wait(SECONDS)
            answered.set()
            return []

        monkeypatch.setattr(download.socket, "getaddrinfo", getaddrinfo)
        try:
            self.fails(site, tmp_path, "localhost: no name server answers")
        finally:
            may_answer.set()
        assert answered.wait(SECONDS)

    def test_addresses_of_a_server_share_one_deadline(
        self, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Hazard 164."""
        calls: list[tuple[Sequence[Address], float]] = []

        def connect(addresses: Sequence[Address], seconds: float) -> socket.socket:
            calls.append((addresses, seconds))
            raise DialError(Reason.TIMEOUT, str(addresses[-1]))

        found = [(0, 0, 0, "", (f"192.0.2.{number}", 443)) for number in range(20)]
        monkeypatch.setattr(download.socket, "getaddrinfo", lambda *_, **__: found)
        monkeypatch.setattr(download, "connect", connect)
        self.fails(site, tmp_path, r"192.0.2.19:\d+: timed out")
        ((addresses, seconds),) = calls
        assert len(addresses) == 20 and seconds <= download.SILENT_SECONDS

    def test_redirection_without_tls_is_not_followed(self, site: Site, tmp_path: Path) -> None:
        site.status, site.headers = 302, {"Location": "http://localhost:1/list.txt"}
        self.fails(site, tmp_path, "unknown url type: http")

    def test_certificate_of_a_stranger_is_refused(self, site: Site, tmp_path: Path) -> None:
        with pytest.raises(DownloadError, match="certificate verify failed"):
            download.download(site.url, str(tmp_path / "new"), "")

    def test_port_without_a_server_is_an_error(self, site: Site, tmp_path: Path) -> None:
        site.shutdown()
        site.server_close()
        self.fails(site, tmp_path, "refused")


def test_failures_double_the_wait_up_to_the_refresh(
    site: Site, tmp_path: Path, keep: Keep, log: RecordingLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "RETRY_FIRST", 0.001)
    site.status = 500
    made = keep(item := wanted(site, tmp_path))
    wait_for(lambda: made._copies[item].failures >= 4)
    site.status = 200
    wait_for(made.take_changed)
    assert made._copies[item].failures == 0
