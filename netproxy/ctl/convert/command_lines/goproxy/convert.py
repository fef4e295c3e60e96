"""Converts command lines of goproxy, and the files of options that it reads (proxy @FILE)."""

from __future__ import annotations

import re

from netproxy.ctl.convert.command_lines.commands import Style, Word, read_commands
from netproxy.ctl.convert.command_lines.goproxy import tags
from netproxy.ctl.convert.command_lines.goproxy.forwards import add_dns, add_forward
from netproxy.ctl.convert.command_lines.goproxy.options import Options
from netproxy.ctl.convert.command_lines.goproxy.proxies import PROTOCOLS, Proxies, lose
from netproxy.ctl.convert.command_lines.goproxy.tunnels import Tunnels
from netproxy.ctl.convert.command_lines.logins import Logins
from netproxy.ctl.convert.command_lines.name_servers import drop_dns
from netproxy.ctl.convert.draft.listeners import tell_of_guarded_targets
from netproxy.ctl.convert.draft.rule_list import RuleList
from netproxy.ctl.convert.source import ConversionError, Source
from netproxy.ctl.convert.terms.conditions import ANY, both, wanting
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.ctl.convert.draft.draft import Draft
    from netproxy.ctl.convert.notes import Notes

COMMANDS = "http|socks|sps|tcp|udp|dns|t?bridge|t?server|t?client"
STYLE = Style(r"(?:go)?proxy(?:[-_][\w.-]+)?", rf"(?:{COMMANDS})(?: -|$)")
_ALONE = re.compile(rf"(?i)({COMMANDS})\s*\Z")
_NO_BIND = "goproxy serves no BIND"


def convert(source: Source, draft: Draft, notes: Notes) -> None:
    """Fill the draft with what the commands say.  Raises ConversionError."""
    _Conversion(source, draft, notes).run()


def _commands(source: Source) -> list[list[Word]]:
    """Return the words of all commands.  Raises ConversionError."""
    lines = [line.strip() for line in source.text.splitlines()]
    first = next((line for line in lines if line and not line.startswith("#")), "")
    if not source.words and _ALONE.match(first):
        return [_words_of_file(source)]
    commands = []
    for words in read_commands(source, STYLE):
        if words and words[0].text.startswith("@"):
            [file] = source.included(words[0].text[1:])
            words = _words_of_file(file)
        if words:
            commands.append(words)
    return commands


def _words_of_file(source: Source) -> list[Word]:
    """Return the words of a file that has an option with its value on each line."""
    words = []
    for number, line in enumerate(source.text.splitlines(), 1):
        text = line.strip()
        if text and not text.startswith("#"):
            words += [Word(part.strip("\"'"), number) for part in text.split(None, 1)]
    return words


class _Conversion:
    def __init__(self, source: Source, draft: Draft, notes: Notes) -> None:
        self._source, self._draft, self._notes = source, draft, notes
        self._logins = Logins(draft, notes)
        self._proxies = Proxies(draft, notes, self._logins)
        self._tunnels = Tunnels(draft, notes)
        self._all: list[Options] = []

    def run(self) -> None:
        for words in _commands(self._source):
            # An image may have the program as its first argument.
            if words[0].text.rpartition("/")[2].lower() in ("proxy", "goproxy") and len(words) > 1:
                words = words[1:]
            options = Options(words, self._source, self._notes)
            self._all.append(options)
            self._add(options)
        if not self._all:
            raise ConversionError(f"{self._source.name}: has no command of goproxy")
        self._tunnels.finish()
        self._add_rules()
        for options in self._all:
            _note_rest(options, self._draft)
        drop_dns(self._draft, self._notes)
        tell_of_guarded_targets(self._draft, self._notes)

    def _add(self, options: Options) -> None:
        if options.command in PROTOCOLS:
            self._proxies.add(options)
        elif options.command in ("tcp", "udp"):
            add_forward(options, self._draft, self._notes)
        elif options.command == "dns":
            add_dns(options, self._draft, self._notes)
        elif re.fullmatch(COMMANDS, options.command):
            self._tunnels.add(options)
        else:
            lose(options, tags.COMMANDS.get(options.command, "is not a command"), self._notes)

    def _add_rules(self) -> None:
        rules, proxies = RuleList(self._draft), self._proxies.proxies
        self._logins.finish()
        socks = [
            name for proxy in proxies if proxy.protocol in ("socks5", "sps") for name in proxy.names
        ]
        total = len(self._draft.listeners)
        if socks:
            names = wanting("listener", socks) if len(socks) < total else ANY
            match = both(names, wanting("command", ["bind"]))
            rule = rules.add(match, "block") if match is not None else None
            if rule is not None:
                rule.comments.append(_NO_BIND)
        for proxy in proxies:
            is_alone = len(proxy.names) == total
            listeners = ANY if is_alone else wanting("listener", proxy.names)
            self._proxies.add_rules(proxy, listeners, rules)


def _note_rest(options: Options, draft: Draft) -> None:
    """Note the options that nothing has used."""
    for name in options.rest():
        if name == "--warn":
            draft.put("log.level", "warning", *options.origins(name))
            options.texts(name)
        elif name == "--debug":
            draft.put("log.level", "debug", *options.origins(name))
            options.texts(name)
        elif name.startswith("--kcp-"):
            options.lost(name, "KCP is not spoken")
        elif name in tags.UNNEEDED:
            options.unneeded(name, tags.UNNEEDED[name])
        else:
            options.lost(name, tags.LOST.get(name, tags.UNKNOWN_OPTION))
