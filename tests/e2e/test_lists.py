"""A rule's list that is fetched from an HTTPS server, and comes into force by itself."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.e2e.conftest import Start
from tests.e2e.peers import CONNECT, Refused, TcpEcho, socks5
from tests.e2e.support import LOOPBACK, SECONDS, environment
from tests.remote_lists.test_keeper import Site
from tests.support.certificates import certificates

pytestmark = pytest.mark.e2e


def test_fetched_list_is_in_force_and_outlives_the_daemon(netproxyd: Start, tmp_path: Path) -> None:
    """A second daemon has the copy at once, while the server is gone."""
    site = Site()
    text = (
        f"listeners: [{{listen: '{LOOPBACK}:0'}}]\nstate: {tmp_path}\n"
        f"dns: {{servers: {LOOPBACK}, hosts: {{a.blocked.test: {LOOPBACK}}}}}\n"
        f"rules: [{{domain_file: '{site.url}', via: block}}]\n"
    )
    trusting = environment(SSL_CERT_FILE=certificates().path("ca.pem"))
    site.body = b".blocked.test\n"
    with TcpEcho() as target:
        wanted = "a.blocked.test", target.address[1]
        try:
            daemon = netproxyd(config=text, env=trusting)
            assert daemon.said("it matches nothing until it is fetched")
            assert daemon.said("fetched, 1 entries") and daemon.said("fetched lists are in force")
        finally:
            site.shutdown()
            site.thread.join()
            site.server_close()
        with pytest.raises(Refused):
            socks5(daemon.server, CONNECT, wanted)
        daemon.signal(signal.SIGTERM)
        assert daemon.wait(SECONDS) == 0
        another = netproxyd(config=text, env=trusting)
        with pytest.raises(Refused):
            socks5(another.server, CONNECT, wanted)
        assert not another.lines("matches nothing")
        # The list goes from the configuration, and its copy from the folder of state.
        (tmp_path / "netproxyd2.yaml").write_text(text.partition("rules:")[0])
        another.signal(signal.SIGHUP)
        assert another.said("no rule uses this list any more")
        assert not list((tmp_path / "lists").iterdir())
    assert len(site.requests) == 1
