"""Reads the section `auth`, and the answers of the program or service that it names.

An answer is a JSON object whose keys and values are written as those of a user's `limits`.
"""

from __future__ import annotations

import re

from netproxy.config.schema import AuthConfig, TimeoutsConfig, UserLimitsConfig
from netproxy.config.sections.users import read_user_limits
from netproxy.config.tree.node import MapReader, Node
from netproxy.config.tree.problems import Problems
from netproxy.interfaces.networks import is_loopback
from netproxy.typed import Collection

LIMITS = ("connections", "sessions", "connection_rate", "rate", "rate_up", "rate_down", "burst")
"""The limits that an answer may set."""
KEYS = ("upstream", *LIMITS)
"""The keys of an answer."""
RESERVED = ("direct", "block")
"""What an answer may name as an upstream besides those of the configuration."""
_URL = (
    r"(https?)://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?"
    r"(?:/[^\s?#\x00-\x20\x7f-\U0010ffff]*)?\Z"
)
_EXPECTED = "(expected https://auth.example/check, without a user and without a query)"


def read_auth(section: MapReader, timeouts: TimeoutsConfig) -> AuthConfig:
    """Return the external check of logins."""
    defaults = AuthConfig()
    node = section.peek("command")
    command = section.values("command", str)
    if command and node is not None:
        if "/" in command[0]:
            command = (node.source.resolve(command[0]), *command[1:])
        else:
            # The rest of a command in one text may hold a secret.
            program = command[0].partition(" ")[0]
            section.add_error("command", f"'{program}' is not the path of a program")
    has_command, has_url = node is not None, section.has("url")
    auth = AuthConfig(
        command,
        section.read("url", _url, ""),
        section.duration("timeout", defaults.timeout),
        section.duration("cache", defaults.cache, 0.0),
        section.duration("cache_failures", defaults.cache_failures, 0.0),
        section.place_of("command" if has_command else "url"),
    )
    if has_command == has_url:
        section.add_error("", "needs either command or url")
    elif has_command and not command:
        section.add_error("command", "names no program")
    # A login waits once for its turn and once for its check.
    if 2 * auth.timeout > timeouts.handshake:
        message = (
            f"a login can wait 2 x timeout = {2 * auth.timeout:g}s, longer than "
            f"timeouts.handshake ({timeouts.handshake:g}s): lower auth.timeout"
        )
        section.warn("timeout", message)
    section.finish()
    return auth


def _url(text: str) -> str:
    match = re.match(_URL, text)
    if not match:
        # It may hold a password: it is not repeated.
        raise ValueError(f"is not the URL of a service {_EXPECTED}")
    scheme, host, port = match.groups()
    if port is not None and not 0 < int(port) < 65536:
        raise ValueError(f"has the port {port}, which is not from 1 to 65535")
    if scheme == "http" and host.lower() == "localhost":
        # The name may be looked up elsewhere.
        raise ValueError("needs an address with http: write 127.0.0.1 or [::1], or use https")
    if scheme == "http" and not is_loopback(host.strip("[]")):
        raise ValueError("sends passwords in plain text to another machine: use https")
    return text


class AnswerReader:
    """Parses answers.  An AnswerParser of access.external.logins."""

    def __init__(self, upstreams: Collection[str]) -> None:
        """`upstreams`: the names of those that are configured."""
        self._upstreams = frozenset(upstreams).union(RESERVED)

    def parse(self, text: str) -> tuple[str, UserLimitsConfig]:
        """Return the name of the upstream, "" for none, and the limits.  Raises ValueError."""
        import json  # late: few daemons get such answers

        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            # RecursionError: nested too deeply.
            raise ValueError("it is not JSON") from None
        if not isinstance(answer, dict):
            raise ValueError("it is not a JSON object")
        if unknown := sorted(answer.keys() - set(KEYS)):
            raise ValueError(f"unknown key '{unknown[0]}' (known: {', '.join(KEYS)})")
        upstream = answer.pop("upstream", "")
        if not isinstance(upstream, str) or upstream and upstream not in self._upstreams:
            raise ValueError(f"there is no upstream {upstream!r}")
        problems = Problems()
        nodes = {key: Node(_value(key, value), "auth") for key, value in answer.items()}
        limits = read_user_limits(MapReader(Node(nodes, "auth"), "", problems))
        if problems.errors:
            raise ValueError(str(problems.errors[0]).removeprefix("auth: "))
        return upstream, limits


def _value(key: str, value: object) -> str:
    """Return a value as the configuration writes it.  Raises ValueError."""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return f"{value:.12g}"
        except OverflowError:
            raise ValueError(f"{key} is too large a number") from None
    raise ValueError(f"{key} must be a number or a text")
