"""Reads the lists of rules: paths of files, and URLs of lists that are fetched.

A fetched list has its copy in the folder of state; for the rest of the program it is a file like
any other.
"""

from __future__ import annotations

import re

from netproxy.config.tree.node import MapReader, Node
from netproxy.interfaces.services import FetchedPath, RemoteList
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.config.tree.problems import Problems

REFRESH_SHORTEST = 300.0
"""Seconds: servers of lists ask not to be asked more often."""
LISTS_LIMIT = 100
"""Lists that are fetched: one thread fetches all of them."""
DEFAULT_REFRESH = 86400.0
FOLDER = "lists"


class ListReader:
    """Reads the lists of all rules of a configuration."""

    def __init__(self, folder: str, problems: Problems) -> None:
        """`folder`: that of the state, "" for none."""
        self.folder = f"{folder}/{FOLDER}" if folder else ""
        """Where the copies are; "" for nowhere."""
        self._problems = problems
        self._lists: dict[FetchedPath, RemoteList] = {}

    @property
    def lists(self) -> tuple[RemoteList, ...]:
        """The lists that are fetched."""
        return tuple(self._lists.values())

    def read(self, section: MapReader, kind: str) -> tuple[str, ...]:
        """Take the key `kind` of a rule, DOMAINS or NETWORKS; return the paths of its lists."""
        node = section.peek(kind)
        if node is None:
            return section.paths(kind)
        entries = node.value if isinstance(node.value, list) else [node]
        remote = [entry for entry in entries if _is_remote(entry)]
        if not remote:
            return section.paths(kind)
        section.take(kind)
        name = f"{section.path}.{kind}"
        paths: tuple[str, ...] = tuple(self._list(entry, name, kind) for entry in remote)
        if files := [entry for entry in entries if not _is_remote(entry)]:
            value = Node({kind: Node(files, node.place)}, node.place)
            paths += MapReader(value, section.path, self._problems).paths(kind)
        return paths

    def _list(self, node: Node, name: str, kind: str) -> FetchedPath:
        if not isinstance(node.value, dict):
            node = Node({"url": node}, node.place)
        section = MapReader(node, name, self._problems)
        if not section.has("url"):
            section.add_error("url", "is missing")
        url = section.read("url", _url, "")
        refresh = section.duration("refresh", DEFAULT_REFRESH)
        sha256 = section.read("sha256", _sha256, "")
        section.finish()
        if refresh < REFRESH_SHORTEST:
            section.add_error("refresh", f"must be at least {REFRESH_SHORTEST:g} s")
        if not self.folder and not self._problems.is_unread("state"):
            section.add_error("url", "needs a folder for the copy of the list: set state")
        path = FetchedPath(f"{self.folder}/{_file_name(url, kind)}")
        wanted = RemoteList(url, path, kind, refresh, sha256)
        if self._lists.setdefault(path, wanted) != wanted:
            section.add_error("url", "another rule has this list with other values")
        if len(self._lists) > LISTS_LIMIT:
            section.add_error("url", f"more than {LISTS_LIMIT} lists are fetched")
        return path


def _is_remote(node: Node) -> bool:
    return isinstance(node.value, dict) or (isinstance(node.value, str) and "://" in node.value)


def _file_name(url: str, kind: str) -> str:
    """Return the name of a copy: that of its URL, and what tells it from all others."""
    import hashlib  # late: few configurations have such lists

    name = re.sub(r"[^A-Za-z0-9._-]", "_", url.rpartition("/")[2])[:64]
    return f"{hashlib.sha256(f'{kind} {url}'.encode()).hexdigest()[:16]}-{name or 'list'}"


def _url(text: str) -> str:
    match = re.fullmatch(r"https://([^/\s]+)(?:/\S*)?", text)
    if match is None:
        shown = text.partition("?")[0]
        raise ValueError(f"'{shown}' is not the URL of a list (expected https://host/path)")
    if "@" in match[1]:
        raise ValueError("the URL of a list cannot have a user or a password")
    return text


def _sha256(text: str) -> str:
    if not re.fullmatch("[0-9a-fA-F]{64}", text):
        raise ValueError("must have 64 hexadecimal digits (sha256sum prints them)")
    return text.lower()
