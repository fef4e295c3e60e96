# -- a dial under way


class Slow:
    """A target that answers no attempt to connect, until it is open or gone; the kernel tries again after a second."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._listening = self._stack.enter_context(listen(backlog=0))
        self.address = address_of(self._listening)
        for _ in range(2):
            sock = self._stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(self.address)

    def open(self) -> socket.socket:
        """Gives the first connection whose client has said anything."""
        while True:
            sock, _ = self._listening.accept()
            self._stack.enter_context(sock)
            sock.settimeout(SECONDS)
            if not nothing_comes(sock, 0.2):
                return sock

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def slow() -> Iterator[Slow]:
    slow = Slow()
    yield slow
    slow.close()


def dialling(relay: Running, address: Address, data: bytes = b"") -> socket.socket:
    """A client whose target is being dialled, without a thread."""
    sock = socket.create_connection((LOCALHOST, relay.port), SECONDS)
    sock.sendall(GREETING + socks5_request(address) + data)
    assert read_exactly(sock, 2) == ANONYMOUS
    poller = relay.daemon._runtime.poller
    wait_until(
        lambda: any(len(parked.descriptors) == 2 for parked in list(poller._parked.values()))
    )
    assert relay.daemon.pools["connection"]._number == 0
    return sock


def test_nothing_is_said_before_the_dial_is_done_and_then_all_is(slow: Slow) -> None:
    """Hazard 15."""
    with running() as relay, dialling(relay, slow.address, b"early") as sock:
        assert nothing_comes(sock)
        upstream = slow.open()
        assert read_exactly(sock, 10) == b"\5\0\0" + pack_address(Address(*upstream.getpeername()))
        assert read_exactly(upstream, 5) == b"early"
        upstream.sendall(b"hello")
        assert read_exactly(sock, 5) == b"hello"
        assert relay.daemon.pools["connection"]._number == 0
        sock.close()
        wait_until(lambda: not relay.daemon.live or upstream.recv(1) == b"")


def test_one_that_fails_after_a_while_is_told(slow: Slow) -> None:
    with running() as relay, dialling(relay, slow.address) as sock:
        slow.close()
        assert read_to_end(sock) == b"\5\5\0\1" + bytes(6)
        wait_until(lambda: not relay.daemon.live)
        assert [(record.upstream, record.ended) for record in relay.log.records] == [
            ("direct", "connection refused")
        ]
        assert relay.count("dial_failures", "connection refused") == 1


@pytest.mark.parametrize(
    "ask, answer",
    [
        (lambda address: GREETING + socks5_request(address), ANONYMOUS + b"\5\6\0\1" + bytes(6)),
        (http, b"HTTP/1.1 504 Gateway Timeout\r\n"),
    ],
    ids=["socks5", "http"],
)
def test_one_whose_time_is_up_is_told_whatever_its_client_says_meanwhile(
    ask: Callable[[Address], bytes], answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parker_module, "TICK", 0.02)
    with black_hole() as address, running(SPS + "\ntimeouts: {connect: 300ms}") as relay:
        with socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock:
            started = time.monotonic()
            sock.sendall(ask(address))
            for _ in range(20):
                sock.sendall(b"x")
                time.sleep(0.01)
            assert read_to_end(sock)[: len(answer)] == answer
            assert 0.3 <= time.monotonic() - started < 2.0
        wait_until(lambda: not relay.daemon.live)
        assert [(record.upstream, record.ended) for record in relay.log.records] == [
            ("direct", "timed out")
        ]
        assert relay.count("dial_failures", "timed out") == 1


def test_a_client_that_resets_meanwhile_ends_it_at_once() -> None:
    with black_hole() as address, running() as relay:
        before = len(os.listdir("/proc/self/fd"))
        reset(dialling(relay, address))
        wait_until(lambda: not relay.daemon.live, 2.0)
        assert len(os.listdir("/proc/self/fd")) == before
        assert [(record.upstream, record.sent, record.ended) for record in relay.log.records] == [
            ("direct", 0, "client left")
        ]
        assert relay.daemon.pools["connection"]._number == 0 and not relay.count(
            "dial_failures", "timed out"
        )


def test_a_client_that_only_stops_sending_meanwhile_still_gets_its_answer(slow: Slow) -> None:
    with running() as relay, dialling(relay, slow.address, b"all I say") as sock:
        sock.shutdown(socket.SHUT_WR)
        upstream = slow.open()
        assert read_to_end(upstream) == b"all I say"
        upstream.sendall(b"answer")
        upstream.shutdown(socket.SHUT_WR)
        assert read_to_end(sock)[10:] == b"answer"
    assert [(record.sent, record.received, record.ended) for record in relay.log.records] == [
        (9, 6, "closed")
    ]


def test_a_stop_meanwhile_ends_it_at_once_and_leaves_nothing_open() -> None:
    relay = Running(SPS)
    with black_hole() as address, dialling(relay, address) as sock:
        started = time.monotonic()
        relay.daemon.stop()
        assert time.monotonic() - started < 1.5
        assert read_to_end(sock) == b"" and not relay.daemon.live
        assert [record.ended for record in relay.log.records] == ["client left"]


def test_a_reload_meanwhile_changes_nothing_for_it(slow: Slow) -> None:
    with running() as relay, dialling(relay, slow.address, b"x") as sock:
        relay.reload(BLOCK)
        upstream = slow.open()
        assert read_exactly(sock, 10)[1] == 0 and read_exactly(upstream, 1) == b"x"


def test_an_event_of_the_last_owner_of_its_descriptor_does_not_end_it(slow: Slow) -> None:
    with running() as relay, dialling(relay, slow.address) as sock:
        poller = relay.daemon._runtime.poller
        [parked] = {id(one): one for one in poller._parked.values()}.values()
        number = parked.pause.watched[0][0].fileno()
        before, seconds = parked.pause, parked.pause.seconds
        again: Any = before.step(number, 4)  # on the test's thread: the parker's has nothing to do
        assert [(one, events) for one, events in again.watched] == list(
            before.watched
        ) and again.seconds < seconds
        sock.sendall(b"x")
        upstream = slow.open()
        assert read_exactly(sock, 10)[1] == 0 and read_exactly(upstream, 1) == b"x"
    assert [record.ended for record in relay.log.records] != ["timed out"]


# -- a handshake under way


def test_a_reload_between_greeting_and_request_changes_nothing_for_it() -> None:
    target = EchoTarget()
    with (
        server(target) as address,
        running() as relay,
        socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock,
    ):
        sock.sendall(GREETING)
        assert read_exactly(sock, 2) == ANONYMOUS
        relay.reload(BLOCK)
        assert converse(sock, [socks5_request(address) + b"x"])[10:] == b"got x"


def test_a_drain_lets_it_go_on() -> None:
    target = EchoTarget()
    with (
        server(target) as address,
        running() as relay,
        socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock,
    ):
        sock.sendall(GREETING)
        assert read_exactly(sock, 2) == ANONYMOUS
        relay.daemon.stop_accepting()
        assert converse(sock, [socks5_request(address) + b"x"])[10:] == b"got x"


def test_a_stop_ends_it() -> None:
    relay = Running(SPS)
    with socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock:
        sock.sendall(GREETING + b"\5\1")
        assert read_exactly(sock, 2) == ANONYMOUS
        relay.daemon.stop()
        assert read_to_end(sock) == b"" and not relay.daemon.live and not relay.log.records


@pytest.mark.parametrize(
    "said, answer",
    [
        (b"", b""),
        (b"\5", b""),
        (GREETING + b"\5\1", ANONYMOUS),
        (b"CONNECT a:1 HTTP/1.1\r\n", b"HTTP/1.1 408 Request Timeout\r\n"),
    ],
    ids=["silent", "half a greeting", "half a request", "half a head"],
)
def test_the_handshakes_time_is_up(
    said: bytes, answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parker_module, "TICK", 0.02)
    with (
        running(SPS + "\ntimeouts: {handshake: 200ms}") as relay,
        socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock,
    ):
        sock.sendall(said)
        found = read_to_end(sock)
        assert found[: len(answer)] == answer and bool(found) == bool(answer)
        wait_until(lambda: not relay.daemon.live)
        assert (
            not relay.log.records
            and relay.daemon._runtime.serving.counter.value("connections", "accepted") == 1
        )


def test_uot_is_no_target_where_it_is_served() -> None:
    dependencies = HandlerDependencies()
    dependencies.outbound._datagrams = object()  # type: ignore[assignment]
    flow = Flow("tcp", Address(LOCALHOST, 1), Address("sp.v2.udp-over-tcp.arpa", 0), "test", "")
    with pytest.raises(NeedsThread):
        dependencies.outbound.attempt(None, flow, lambda passage: None, lambda error: None)  # type: ignore[arg-type]
    assert dependencies.untouched()


# -- with no thread to be had


def test_a_pool_that_is_busy_keeps_no_connection_to_an_address_waiting() -> None:
    gate, target = Gate(), EchoTarget()
    with (
        server(target) as address,
        running("listeners: [{listen: '127.0.0.1:0', limits: {connections: 100}}]") as relay,
    ):
        pool = relay.daemon.pools["connection"]
        try:
            for _ in range(pool.limit):
                assert pool.submit(gate)
            for ask in (GREETING + socks5_request(address), http_connect(address)) * 3:
                with socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock:
                    assert converse(sock, [ask + b"hello"]).endswith(b"got hello")
            assert pool.busy == pool.limit
        finally:
            gate.let_go()
    assert target.received == [b"hello"] * 6
    assert [(record.sent, record.received, record.ended) for record in relay.log.records] == [
        (5, 9, "closed")
    ] * 6


def test_a_thousand_silent_clients_take_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_module, "GREETERS_LIMIT", 1000)
    target = EchoTarget()
    with (
        server(target) as address,
        running("listeners: [{listen: '127.0.0.1:0', limits: {connections: 2000}}]") as relay,
        ExitStack() as stack,
    ):
        for _ in range(1000):
            stack.enter_context(socket.create_connection((LOCALHOST, relay.port), SECONDS))
        wait_until(lambda: len(relay.daemon._runtime.poller) == 1000)
        with socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock:
            assert converse(sock, [GREETING + socks5_request(address) + b"hello"]).endswith(b"got hello")
        assert (
            relay.daemon.pools["connection"]._number <= 1
        )  # for the oldest, which makes room, to be told apart
