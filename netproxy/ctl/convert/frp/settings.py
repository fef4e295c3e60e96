"""The settings of a file of frp, each with its directive; what is left is noted at the end."""

from __future__ import annotations

import re

from netproxy.typed import TYPE_CHECKING, Iterator, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.ctl.convert.frp.toml import Setting, TomlValue
    from netproxy.ctl.convert.notes import Directive, Notes

_SECRETS = re.compile(r"(?i)token|passw|pwd|secret|groupKey|proxyURL")
# The environment, as templates of frp and as the configuration of netproxyd name it.
_ENVIRONMENT = re.compile(r"\{\{\s*\.Envs\.([A-Za-z_][A-Za-z0-9_]*)\s*\}\}")


class Told(NamedTuple):
    """A setting and its directive."""

    path: tuple[str | int, ...]
    value: TomlValue
    directive: Directive

    @property
    def key(self) -> str:
        """The path with dots, without the number of a list's element."""
        return ".".join(part for part in self.path if isinstance(part, str))


class Table:
    """Some settings, by their keys."""

    def __init__(self, settings: Sequence[Told], notes: Notes) -> None:
        self._all = settings
        self._settings = {told.key: told for told in settings}
        self._notes = notes

    def has(self, key: str) -> bool:
        """Return whether a key is given."""
        return key in self._settings

    def text(self, key: str, default: str = "") -> str:
        """Return the text of a key, which is carried then."""
        told = self.take(key)
        return default if told is None else _text(told.value)

    def number(self, key: str) -> int:
        """Return the number of a key, 0 if it is not given or not a number."""
        text = self.text(key)
        return int(text) if re.fullmatch(r"\d{1,9}", text) else 0

    def flag(self, key: str, default: bool) -> bool:
        """Return the truth of a key."""
        told = self.take(key)
        return default if told is None else told.value is True

    def texts(self, key: str) -> list[str]:
        """Return the texts of a list."""
        told = self.take(key)
        if told is None:
            return []
        return list(map(_text, told.value if isinstance(told.value, list) else [told.value]))

    def take(self, key: str) -> Told | None:
        """Return a setting, which is carried then; None if it is not given."""
        told = self._settings.get(key)
        if told is not None and not self._notes.is_noted(told.directive):
            self._notes.carried(told.directive)
        return told

    def origins(self, *keys: str) -> list[Directive]:
        """Return the directives of keys that are given."""
        return [self._settings[key].directive for key in keys if key in self._settings]

    def lose(self, key: str, why: str, advice: str = "") -> None:
        """Note that a key is not carried, if it is given."""
        for directive in self.origins(key):
            self._notes.lost(directive, why, advice)

    def lose_all(self, why: str) -> None:
        """Note that none of the settings is carried."""
        for told in self._all:
            self._notes.lost(told.directive, why)

    def rest(self) -> list[Told]:
        """Return the settings that nobody has noted."""
        notes = self._notes
        return [told for told in self._all if not notes.is_noted(told.directive)]

    def elements(self, key: str) -> list[dict[str, str]]:
        """Return the tables of a list, which is carried then, by the order of the file."""
        found: dict[object, dict[str, str]] = {}
        for told in self._all:
            if told.path[0] == key and len(told.path) == 3:
                found.setdefault(told.path[1], {})[str(told.path[2])] = _text(told.value)
                self._notes.carried(told.directive)
        return list(found.values())


def tell(settings: Sequence[Setting], name: str, notes: Notes) -> list[Told]:
    """Count the settings of a file; those of tables within a line one by one."""
    told = []
    for setting in settings:
        for path, value in _flat(setting.path, setting.value):
            directive = notes.directive(name, setting.line, _shown(path, value))
            told.append(Told(path, value, directive))
    return told


def _flat(
    path: tuple[str | int, ...], value: TomlValue
) -> Iterator[tuple[tuple[str | int, ...], TomlValue]]:
    """Yield a value, or what it consists of if it is a table or a list of tables."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _flat((*path, *key.split(".")), part)
    elif isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        for number, part in enumerate(value):
            yield from _flat((*path, number), part)
    else:
        yield path, value


def _shown(path: tuple[str | int, ...], value: TomlValue) -> str:
    key = ".".join(map(str, path))
    return f"{key} = {'***' if _SECRETS.search(str(path[-1])) else value}"


def _text(value: TomlValue) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return _ENVIRONMENT.sub(r"${\1}", str(value))
