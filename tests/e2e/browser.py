"""Headless Chromium: loads a page through a proxy and returns what it has made of it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from tests.e2e.support import environment, program

BROWSERS = ("chromium", "chromium-headless-shell", "google-chrome")
# The limit for a browser to start, load the page and end, which takes one to three seconds.
LOAD_SECONDS = 60.0
# The page's own clock. It stands still while anything is being loaded.
VIRTUAL_MILLISECONDS = 10_000
# The browser's own requests go neither to the proxy nor anywhere else.
BROWSER_HOSTS = ("*.google.com", "*.googleapis.com", "*.gvt1.com")
BYPASS = ";".join(("<-loopback>", *BROWSER_HOSTS))
RESOLVER_RULES = "MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1"


def find_browser() -> str:
    """Return the path of a browser. Skip the test without one."""
    return next(filter(None, map(shutil.which, BROWSERS)), None) or program(BROWSERS[0])


class Loaded(NamedTuple):
    """What the browser has made of the page."""

    dom: str
    screenshot: bytes
    errors: str
    net_log: str
    """The browser's own log of its connections, as JSON."""


def load(browser: str, directory: Path, proxy: str, url: str) -> Loaded:
    """Load a page with a new profile in `directory`. Return the page as it is in the end."""
    picture, net_log = directory / "screenshot.png", directory / "net.json"
    command = (
        browser,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--ignore-certificate-errors",
        f"--user-data-dir={directory / 'profile'}",
        f"--proxy-server={proxy}",
        f"--proxy-bypass-list={BYPASS}",
        f"--host-resolver-rules={RESOLVER_RULES}",
        f"--virtual-time-budget={VIRTUAL_MILLISECONDS}",
        "--window-size=1000,400",
        f"--screenshot={picture}",
        f"--log-net-log={net_log}",
        "--dump-dom",
        url,
    )
    process = subprocess.run(
        command,
        cwd=directory,
        env=environment(HOME=str(directory)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=LOAD_SECONDS,
    )
    errors = process.stderr.decode("utf-8", "replace")
    assert process.returncode == 0, errors
    return Loaded(
        process.stdout.decode("utf-8", "replace"),
        picture.read_bytes() if picture.exists() else b"",
        errors,
        net_log.read_text("utf-8", "replace") if net_log.exists() else "",
    )
