"""Reads configurations from text, and upstreams that several tests use."""

from __future__ import annotations

from typing import Any

import pytest

from netproxy.config.tree.parse import parse_text
from netproxy.config.tree.node import Node, Source
from netproxy.config.tree.problems import Problems
from netproxy.config.read import check, read_config
from netproxy.config.schema import Config, HopConfig, UpstreamConfig
from netproxy.errors import ConfigError
from netproxy.interfaces.addresses import Address

H1, H2, H3 = (HopConfig("http", Address(f"h{number}", number)) for number in (1, 2, 3))
HASH = "scrypt$1024$1$1$AAECAwQFBgcICQoLDA0ODw==$" + "A" * 43 + "="
"""The hash of a password, in the form that `users` takes."""
NAMES = "upstreams: {one: 'http://h1:1', two: 'http://h2:2'}"
ONE, TWO = UpstreamConfig((H1,), "one"), UpstreamConfig((H2,), "two")


def read(text: str) -> Config:
    """Return the configuration of a file "c.yaml".  Raises ConfigError."""
    problems = Problems()
    return check(read_config(parse_text(text.encode(), Source("c.yaml")), problems), problems)


def errors(text: str) -> list[str]:
    """Return the errors of a file "c.yaml", which must have some."""
    with pytest.raises(ConfigError) as caught:
        read(text)
    return str(caught.value).split("\n")


def default(text: str, more: str = "") -> UpstreamConfig:
    """Return the upstream of `default: TEXT`."""
    return read(f"default: {text}\n{more}").default


def default_errors(text: str, more: str = "") -> list[str]:
    """Return the errors of `default: TEXT`; its first column is 10."""
    return errors(f"default: {text}\n{more}")


def plain(node: Node) -> Any:
    """Return a tree without places: text, lists and dicts."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    return [plain(child) for child in node.value] if isinstance(node.value, list) else node.value
