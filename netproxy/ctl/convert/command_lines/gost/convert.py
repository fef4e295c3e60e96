"""Converts command lines of gost, versions 2 and 3."""

from __future__ import annotations

import re

from netproxy.ctl.convert.command_lines.commands import Style, Word, read_commands, split_texts
from netproxy.ctl.convert.command_lines.gost import tags
from netproxy.ctl.convert.command_lines.gost.access import add_rules
from netproxy.ctl.convert.command_lines.gost.chain import Chain, Hops
from netproxy.ctl.convert.command_lines.gost.nodes import Node, shown_node
from netproxy.ctl.convert.command_lines.gost.names import put_names
from netproxy.ctl.convert.command_lines.gost.options import note_option
from netproxy.ctl.convert.command_lines.gost.services import Services
from netproxy.ctl.convert.command_lines.gost_files.config import is_config, note_rest, read_config
from netproxy.ctl.convert.command_lines.logins import Logins
from netproxy.ctl.convert.command_lines.name_servers import drop_dns
from netproxy.ctl.convert.draft.listeners import tell_of_guarded_targets
from netproxy.ctl.convert.draft.rule_list import RuleList
from netproxy.ctl.convert.source import ConversionError
from netproxy.ctl.convert.terms.conditions import ANY, wanting
from netproxy.typed import TYPE_CHECKING, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.ctl.convert.command_lines.gost_files.tree import Tree
    from netproxy.ctl.convert.draft.draft import Draft
    from netproxy.ctl.convert.notes import Directive, Notes
    from netproxy.ctl.convert.source import Source

STYLE = Style(r"gost(?:[-_][\w.-]+)?", r"-[LFC][ =:]")
_WITHOUT_VALUE = ("D", "DD", "V", "h", "help")
_UNUSED = "no listener that is carried uses it"
_NO_BIND = "gost serves BIND only with bind=true (version 2 always)"


class Option(NamedTuple):
    """An option of a command, with its value."""

    name: str
    value: str
    directive: Directive


def convert(source: Source, draft: Draft, notes: Notes) -> None:
    """Fill the draft with what the commands say.  Raises ConversionError."""
    _Conversion(source, draft, notes).run()


class _Conversion:
    def __init__(self, source: Source, draft: Draft, notes: Notes) -> None:
        self._source, self._draft, self._notes = source, draft, notes
        self._logins = Logins(draft, notes)
        self._services = Services(source, draft, notes, self._logins)
        self._nodes: list[Node] = []
        # The chains by the identity of their lists, which are kept so that none is made again.
        self._chains: dict[tuple[int, bool], Chain] = {}
        self._kept: list[list[Node]] = []
        self._unused: list[Node] = []
        self._trees: list[Tree] = []

    def run(self) -> None:
        if is_config(self._source):
            self._add_file(self._source)
        else:
            for command in read_commands(self._source, STYLE):
                # Each part is a process of its own, with its chain.
                for part in split_texts(command, lambda text: text == "--"):
                    self._add_part(part)
        for node in self._unused:
            if not self._notes.is_noted(node.directive):
                self._notes.unneeded(node.directive, _UNUSED)
                for key in node.rest():
                    node.unneeded(key, _UNUSED)
        self._add_rules()
        for node in self._nodes:
            _note_rest(node)
        for tree in self._trees:
            note_rest(tree, self._notes)
        drop_dns(self._draft, self._notes)
        tell_of_guarded_targets(self._draft, self._notes)

    def _add_part(self, words: Sequence[Word]) -> None:
        options = list(self._options(words))
        nodes = [self._node(option) for option in options if option.name == "F"]
        listeners = [self._node(option) for option in options if option.name == "L"]
        for option in options:
            if option.name == "C":
                self._include(option)
            elif option.name not in ("F", "L"):
                note_option(option.name, option.value, option.directive, self._draft, self._notes)
        self._add(listeners, nodes)

    def _include(self, option: Option) -> None:
        """Read the file of -C."""
        try:
            [file] = self._source.included(option.value)
            self._add_file(file)
        except (ConversionError, ValueError) as error:
            self._notes.lost(option.directive, str(error))
        else:
            self._notes.carried(option.directive)

    def _add_file(self, source: Source) -> None:
        file = read_config(source, self._draft, self._notes)
        self._trees.append(file.tree)
        for part in file.parts:
            self._nodes += [*part.services, *part.chain]
            self._nodes += [other for node in part.chain for other in node.others]
            self._add(part.services, part.chain)

    def _add(self, listeners: list[Node], nodes: list[Node]) -> None:
        """Add services with their chain, which several of them may share."""
        by_target = any(node.text("hash") == "host" for node in listeners)
        place = (id(nodes), by_target)
        if place not in self._chains:
            for node in nodes:
                put_names(node, self._draft)
            self._unused += nodes
            self._kept.append(nodes)
            self._chains[place] = Chain(nodes, Hops(self._draft, self._notes, by_target))
        for node in listeners:
            self._services.add(node, self._chains[place])

    def _node(self, option: Option) -> Node:
        node = Node(option.value, option.directive, self._notes)
        self._nodes.append(node)
        return node

    def _options(self, words: Sequence[Word]) -> list[Option]:
        """Return the options of a command with their values."""
        options: list[Option] = []
        place = 0
        while place < len(words):
            word = words[place]
            place += 1
            match = re.fullmatch(r"--?([A-Za-z]+)(?:=(.*))?", word.text, re.DOTALL)
            if not match:
                directive = self._notes.directive(self._source.name, word.line, word.text)
                self._notes.lost(directive, "is neither an option nor its value")
                continue
            name, value = match[1], match[2]
            if value is None and name not in _WITHOUT_VALUE:
                value = words[place].text if place < len(words) else ""
                place += 1
            shown = shown_node(value or "") if name in ("L", "F", "api", "metrics") else value or ""
            text = f"-{name} {shown}".rstrip()
            directive = self._notes.directive(self._source.name, word.line, text)
            options.append(Option(name, value or "", directive))
        return options

    def _add_rules(self) -> None:
        services = self._services.services
        self._logins.finish()
        is_alone = len(self._draft.listeners) == 1
        without_bind = [service.name for service in services if not service.serves_bind]
        rules = RuleList(self._draft)
        if without_bind:
            match = wanting("command", ["bind"])
            if len(without_bind) < len(self._draft.listeners):
                match = match._replace(wanted={"listener": tuple(without_bind), **match.wanted})
            rule = rules.add(match, "block")
            if rule is not None:
                rule.comments.append(_NO_BIND)
        for service in services:
            listener = ANY if is_alone else wanting("listener", [service.name])
            add_rules(service.node, listener, service.chain, rules)


def _note_rest(node: Node) -> None:
    """Note the parameters that nothing has used."""
    for key in node.rest():
        if key in tags.UNNEEDED:
            node.unneeded(key, tags.UNNEEDED[key])
        elif key in tags.LOST:
            node.lost(key, tags.LOST[key] or tags.OF_TRANSPORT)
        else:
            node.lost(key, tags.UNKNOWN_PARAMETER)
