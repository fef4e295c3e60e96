"""Converts the files of frp: frps is a bridge, frpc an agent with services."""

from __future__ import annotations

import os

from netproxy.ctl.convert.frp import tables
from netproxy.ctl.convert.frp.client import convert_client
from netproxy.ctl.convert.frp.ini import read_ini
from netproxy.ctl.convert.frp.server import convert_server
from netproxy.ctl.convert.frp.settings import Table, Told, tell
from netproxy.ctl.convert.frp.toml import read_toml
from netproxy.ctl.convert.source import ConversionError
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.ctl.convert.draft.draft import Draft
    from netproxy.ctl.convert.notes import Notes
    from netproxy.ctl.convert.source import Source

_SERVER_KEYS = {"bindPort", "bindAddr", "allowPorts", "vhostHTTPPort", "vhostHTTPSPort"}


def convert(source: Source, draft: Draft, notes: Notes) -> None:
    """Fill the draft with what the file says.  Raises ConversionError."""
    settings = _read(source, notes)
    proxies: dict[object, list[Told]] = {}
    whole: list[Told] = []
    for told in settings:
        if told.path[0] == "proxies" and len(told.path) > 2:
            proxies.setdefault(told.path[:2], []).append(told._replace(path=told.path[2:]))
        else:
            whole.append(told)
    table = Table(whole, notes)
    tables_of_proxies = [Table(found, notes) for found in proxies.values()]
    if is_server(source, {told.key for told in whole}):
        convert_server(table, draft, notes)
    else:
        convert_client(table, tables_of_proxies, draft, notes)
    _note_level(table, draft)
    for told in table.rest():
        _note_rest(told, notes)
    for proxy in tables_of_proxies:
        for told in proxy.rest():
            _note_proxy_rest(told, notes)


def is_server(source: Source, keys: set[str]) -> bool:
    """Return whether a file is that of frps."""
    base = os.path.basename(source.path).lower()
    if "frps" in base or "frpc" in base:
        return "frps" in base
    return bool(keys & _SERVER_KEYS) and "serverAddr" not in keys


def _read(source: Source, notes: Notes) -> list[Told]:
    """Return the settings of a file and of those that it includes."""
    text = source.text.lstrip()
    if text.startswith(("{", "---")) or source.path.endswith((".yaml", ".yml", ".json")):
        raise ConversionError(f"{source.name}: write it as TOML: YAML and JSON are not read")
    is_ini = source.path.endswith(".ini") or "[common]" in source.text
    settings = (read_ini if is_ini else read_toml)(source.text, source.name)
    told = tell(settings, source.name, notes)
    for include in [entry for entry in told if entry.key == "includes"]:
        notes.carried(include.directive)
        patterns = include.value if isinstance(include.value, list) else [include.value]
        try:
            files = [file for pattern in patterns for file in source.included(str(pattern))]
        except ConversionError as error:
            notes.lost(include.directive, str(error))
            continue
        for number, file in enumerate(files):
            told += [
                # Their proxies are others than those of the first file.
                entry._replace(path=(entry.path[0], f"{number}-{entry.path[1]}", *entry.path[2:]))
                for entry in _read(file, notes)
                if entry.path[0] == "proxies" and len(entry.path) > 2
            ]
    return told


def _note_level(table: Table, draft: Draft) -> None:
    level = table.text("log.level")
    known = {"trace": "debug", "warn": "warning"}
    if level:
        name = known.get(level, level)
        level = name if name in ("debug", "info", "warning", "error") else "info"
        draft.put("log.level", level, *table.origins("log.level"))


def _note_rest(told: Told, notes: Notes) -> None:
    """Note a setting of the whole file that nothing else has noted."""
    key = told.key
    for prefix, why in tables.PREFIXES_UNNEEDED.items():
        if key.startswith(prefix):
            notes.unneeded(told.directive, why)
            return
    lost = next((why for start, why in tables.LOST.items() if key.startswith(start)), "")
    if lost and told.value not in tables.EMPTY:
        notes.lost(told.directive, lost)
    elif lost:
        notes.unneeded(told.directive, "is empty")
    elif key in tables.UNNEEDED and not (key == "auth.method" and told.value not in ("", "token")):
        notes.unneeded(told.directive, tables.UNNEEDED[key])
    else:
        notes.lost(told.directive, "is not supported")


def _note_proxy_rest(told: Told, notes: Notes) -> None:
    key = told.key
    if key.startswith(("metadatas", "annotations")):
        notes.unneeded(told.directive, "no plug-in and no dashboard reads them")
        return
    lost = next((why for start, why in tables.PROXY_LOST.items() if key.startswith(start)), "")
    notes.lost(told.directive, lost or "is not supported")
