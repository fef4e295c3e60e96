"""The lists of a configuration file of gost, which services, hops and nodes name."""

from __future__ import annotations

import re

from netproxy.ctl.convert.source import ConversionError
from netproxy.typed import TYPE_CHECKING, Iterator, Sequence

if TYPE_CHECKING:
    from netproxy.ctl.convert.command_lines.gost.nodes import Node
    from netproxy.ctl.convert.command_lines.gost_files.tree import Tree
    from netproxy.ctl.convert.notes import Directive, Notes
    from netproxy.ctl.convert.source import Source

_PLURALS = {"bypass": "bypasses", "admission": "admissions"}
_STORES = ("redis", "http", "plugin")
_ELSEWHERE = "its elements are not known"
_MIXED = "lists of what is permitted are not joined with others"
_SERVICE, _CONNECTION = "$", "$$"
UNKNOWN = ("change-me", "")
"""The login of a service whose users are not known: nobody may be admitted."""


class References:
    """Finds what is named, and adds it to nodes."""

    def __init__(self, tree: Tree, source: Source, notes: Notes) -> None:
        self._tree, self._source, self._notes = tree, source, notes

    def users(self, *trees: Tree) -> list[tuple[str, str]]:
        """Return the logins of the authers that handler or listener name."""
        logins: list[tuple[str, str]] = []
        named = ((tree, name) for tree in trees for name in _names(tree, "auther"))
        for owner, name in named:
            auther = self._find("authers", name)
            pairs = [
                (entry.text("username"), entry.text("password"))
                for entry in (auther.elements("auths") if auther else ())
            ]
            lines = self._lines(auther)
            words = (line.split(None, 1) for line in lines)
            pairs += [(parts[0], parts[1].strip() if parts[1:] else "") for parts in words]
            directive = owner.directive("auther") or owner.directive("authers")
            if not pairs and directive is not None:
                self._notes.lost(directive, f"{name}: its users are not known", "write them here")
                pairs = [UNKNOWN]
            logins += pairs
        return logins

    def put_list(self, node: Node, key: str, tree: Tree, guards: bool) -> None:
        """Add the list of targets or clients that is named as `bypass` or `admission`.

        `guards`: what the list does not permit is refused, rather than led past a hop.  All is
        refused then if its elements are not known; and nothing is led past the hop otherwise.
        """
        directive = tree.directive(key) or tree.directive(_PLURALS[key])
        if directive is None:
            return
        lists = []
        for name in _names(tree, key, _PLURALS[key]):
            if (entry := self._find(_PLURALS[key], name)) is None:
                self._notes.lost(directive, f"{name}: the file has no list of this name")
            else:
                lists.append(entry)
        permits = [entry.text("whitelist").lower() == "true" for entry in lists]
        elements = [element for entry in lists for element in self._elements(entry, directive)]
        is_known = not any(map(self._is_elsewhere, lists))
        effect = "what they permit is refused" if guards else "nothing is led past the hop"
        if any(permits) and len(lists) > 1:
            self._notes.lost(directive, _MIXED, effect)
            elements, is_known = [], False
        if not is_known and guards and not permits[0]:
            self._notes.lost(directive, _ELSEWHERE, "all is refused: write them here")
            elements = []
        elif not is_known and not guards and any(permits):
            self._notes.lost(directive, _ELSEWHERE, effect)
            return
        is_permit = any(permits) or (guards and not is_known)
        if lists:
            node.put(key, ("~" if is_permit else "") + ",".join(elements), directive)

    def _elements(self, entry: Tree, directive: Directive) -> list[str]:
        """Return the elements of a list and of its file."""
        if network := entry.text("network"):
            self._notes.lost(directive, f"is for {network} alone, here for both networks")
        return [text for text in entry.text("matchers").split(",") if text] + self._lines(entry)

    def _is_elsewhere(self, entry: Tree) -> bool:
        """Return whether some elements of a list cannot be read."""
        has_file = entry.directive("file", "path") is not None
        is_lost = has_file and self._file(entry) is None
        return is_lost or any(entry.directive(key) is not None for key in _STORES)

    def put_names(self, node: Node, tree: Tree) -> None:
        """Add the name servers and the fixed addresses that are named."""
        for name in _names(tree, "resolver"):
            servers = self._find("resolvers", name)
            directive = tree.directive("resolver")
            if servers is not None and directive is not None:
                parts = servers.elements("nameservers")
                node.put("resolver", ",".join(part.text("addr") for part in parts), directive)
                if prefer := next(filter(None, (part.text("prefer") for part in parts)), ""):
                    node.put("prefer", prefer, directive)
        for name in _names(tree, "hosts"):
            mapper = self._find("hosts", name)
            directive = tree.directive("hosts")
            if mapper is not None and directive is not None:
                pairs = [
                    f"{host}:{entry.text('ip')}"
                    for entry in mapper.elements("mappings")
                    for host in filter(None, [entry.text("hostname"), *_texts(entry, "aliases")])
                ]
                lines = (line.split() for line in self._lines(mapper))
                pairs += [f"{name}:{words[0]}" for words in lines for name in words[1:]]
                node.put("hosts", ",".join(pairs), directive)

    def put_limits(self, node: Node, tree: Tree) -> None:
        """Add the limits of a service: for all, for each client and for each connection."""
        for key in ("limiter", "climiter", "rlimiter"):
            directive = tree.directive(key)
            limiter = self._find(f"{key}s", tree.text(key)) if directive is not None else None
            if limiter is None or directive is None:
                continue
            for text in _texts(limiter, "limits"):
                scope, *amounts = text.split()
                self._put_limit(node, f"{key}:{scope}", amounts, directive)

    def _put_limit(self, node: Node, kind: str, amounts: Sequence[str], place: Directive) -> None:
        first, second = (*amounts, "", "")[:2]
        if kind == f"limiter:{_SERVICE}":
            node.add("limiter.in", first, place)
            if second:
                node.add("limiter.out", second, place)
        elif kind == f"limiter:{_CONNECTION}":
            node.add("limiter.conn.in", first, place)
        elif kind in (f"climiter:{_SERVICE}", f"rlimiter:{_SERVICE}"):
            node.add(kind.partition(":")[0], first, place)
        elif kind in (f"climiter:{_CONNECTION}", f"rlimiter:{_CONNECTION}"):
            node.add(f"{kind.partition(':')[0]}.client", first, place)
        else:
            client = kind.partition(":")[2]
            self._notes.lost(place, f"{client}: limits are for all or for each")

    def _find(self, kind: str, name: str) -> Tree | None:
        entries = self._tree.elements(kind)
        return next((entry for entry in entries if entry.text("name") == name), None)

    def _lines(self, tree: Tree | None) -> list[str]:
        """Return the lines of the file that a list names."""
        text = self._file(tree) if tree is not None else None
        lines = (re.sub(r"(?:^|\s)#.*", "", line).strip() for line in (text or "").splitlines())
        return [line for line in lines if line]

    def _file(self, tree: Tree) -> str | None:
        """Return the text of the file that a list names, None if there is none."""
        path, directive = tree.text("file", "path"), tree.directive("file", "path")
        if not path or directive is None:
            return None
        try:
            return "\n".join(file.text for file in self._source.included(path))
        except ConversionError as error:
            self._notes.lost(directive, str(error))
            return None


def _names(tree: Tree, *keys: str) -> Iterator[str]:
    """Yield the names that a key, and the same one with an "s", give."""
    plural = keys[1] if len(keys) > 1 else f"{keys[0]}s"
    yield from _texts(tree, keys[0])
    if plural != keys[0]:
        yield from _texts(tree, plural)


def _texts(tree: Tree, key: str) -> list[str]:
    return [text for text in tree.text(key).split(",") if text]
