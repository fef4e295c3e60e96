"""Converts 3proxy.cfg: its commands are carried out in their order, as 3proxy does it."""

from __future__ import annotations

from netproxy.ctl.convert.draft.draft import is_user_name
from netproxy.ctl.convert.draft.listeners import tell_of_guarded_targets
from netproxy.ctl.convert.terms import networks
from netproxy.ctl.convert.threeproxy import tags
from netproxy.ctl.convert.threeproxy.access import add_rules, login
from netproxy.ctl.convert.threeproxy.entries import Entry, Parent, read_entry
from netproxy.ctl.convert.threeproxy.lines import read_commands
from netproxy.ctl.convert.threeproxy.services import PROTOCOLS, Service, State, add_service
from netproxy.ctl.convert.threeproxy.users import add_users, limit
from netproxy.typed import TYPE_CHECKING, Callable

if TYPE_CHECKING:
    from netproxy.ctl.convert.draft.draft import Draft, Value
    from netproxy.ctl.convert.notes import Notes
    from netproxy.ctl.convert.source import Source
    from netproxy.ctl.convert.threeproxy.lines import Command

_METHODS = ("none", "iponly", "strong", "cache", "cacheacl")
"""The methods of auth that are carried."""
_LIMITS = ("bandlimin", "bandlimout", "connlim", "countin", "countout", "countall")
_EXCEPTIONS = ("nobandlimin", "nobandlimout", "nocountin", "nocountout", "nocountall")
# The position in `timeouts`, and the key that says the same.
_TIMES = ((3, "timeouts.handshake"), (5, "timeouts.tcp_idle"), (8, "timeouts.connect"))
_LONGEST = 86400 * 3650


def convert(source: Source, draft: Draft, notes: Notes) -> None:
    """Fill the draft with what the file says."""
    conversion = _Conversion(draft, notes)
    for command in read_commands(source, notes):
        conversion.run(command)
    conversion.finish()


class _Conversion:
    def __init__(self, draft: Draft, notes: Notes) -> None:
        self._draft, self._notes = draft, notes
        self._state = State()
        self._services: list[Service] = []
        self._limits: list[Command] = []
        self._certificate: dict[str, str] = {}
        self._commands: dict[str, Callable[[Command], None]] = {
            **dict.fromkeys(PROTOCOLS, self._service),
            **dict.fromkeys(_LIMITS, self._limits.append),
            **dict.fromkeys(_EXCEPTIONS, self._exception),
            **dict.fromkeys(("allow", "deny"), self._entry),
            **dict.fromkeys(("internal", "external"), self._address),
            **dict.fromkeys(("ssl_serv", "ssl_server"), self._tls),
            **dict.fromkeys(("ssl_noserv", "ssl_noserver"), self._no_tls),
            "auth": self._auth,
            "flush": self._flush,
            "parent": self._parent,
            "maxconn": self._maxconn,
            "users": lambda command: add_users(command, draft, notes),
            "nserver": self._name_server,
            "nscache": self._cache,
            "nsrecord": self._record,
            "timeouts": self._timeouts,
            "log": self._log,
        }

    def run(self, command: Command) -> None:
        """Carry out a command."""
        name, directive = command.name, command.directive
        if name in self._commands:
            self._commands[name](command)
        elif name.startswith("ssl_server_"):
            self._tls_file(command)
        elif name in tags.UNNEEDED:
            self._notes.unneeded(directive, tags.UNNEEDED[name])
        elif name in tags.LOST:
            self._notes.lost(directive, tags.LOST[name])
        elif name.startswith("ssl_"):
            self._notes.lost(directive, "tunes TLS, which has the defaults of Python")
        else:
            self._notes.lost(directive, "is not a command that is known")

    def finish(self) -> None:
        """Make the rules, once all services are known."""
        draft, notes = self._draft, self._notes
        for command in self._limits:
            limit(command, draft, notes)
        if any(login(service) != "none" for service in self._services) and not draft.users:
            draft.user("change-me", None)
            notes.changed(None, "no user has a password that is known: nobody can log in")
        named = {
            name
            for service in self._services
            for entry in service.state.entries
            for name in entry.users
        }
        if draft.users:
            # 3proxy may know them by RADIUS or a plug-in.
            for name in filter(is_user_name, sorted(named - set(draft.users) - {"-"})):
                draft.user(name, None)
        add_rules(self._services, draft, notes)
        self._check_dns()
        for directive in self._unused_entries():
            notes.unneeded(directive.directive, "no service follows")
        tell_of_guarded_targets(draft, notes)

    def _check_dns(self) -> None:
        """Take listeners for DNS away that have no server to ask, or would ask themselves."""
        section = self._draft.sections.get("dns")
        servers = section.settings.get("servers") if section else None
        texts = list(map(str, servers)) if isinstance(servers, list) else []
        hosts = [networks.is_loopback(text.removeprefix("tcp://")) for text in texts]
        for service in [s for s in self._services if s.protocol == "dns"]:
            if not texts or any(hosts):
                self._draft.listeners.remove(service.listener)
                self._notes.lost(service.directive, "has no nserver on another machine to ask")

    def _unused_entries(self) -> list[Entry]:
        used = {e.directive.number for s in self._services for e in s.state.entries}
        return [e for e in self._state.entries if e.directive.number not in used]

    # -- commands

    def _service(self, command: Command) -> None:
        service = add_service(command, self._state, self._draft, self._notes)
        if service is not None:
            self._services.append(service)

    def _auth(self, command: Command) -> None:
        methods = tuple(word.lower() for word in command.words)
        self._state = self._state._replace(auth=methods)
        self._notes.carried(command.directive)
        if unknown := set(methods) - set(_METHODS):
            why = f"{', '.join(sorted(unknown))}: logins are by name and password"
            self._notes.lost(command.directive, why, "auth.command can ask another program")

    def _entry(self, command: Command) -> None:
        entry = read_entry(command, command.name == "allow")
        self._state = self._state._replace(entries=(*self._state.entries, entry))

    def _flush(self, command: Command) -> None:
        for entry in self._unused_entries():
            self._notes.unneeded(entry.directive, "no service follows before flush")
        self._state = self._state._replace(entries=())
        self._notes.carried(command.directive)

    def _parent(self, command: Command) -> None:
        entries = self._state.entries
        weight, port = command.word(0), command.word(3)
        if not entries or not entries[-1].allows or not (weight.isdigit() and port.isdigit()):
            self._notes.lost(
                command.directive, "does not follow an allow, or has no weight and port"
            )
            return
        user, password = command.word(4), command.word(5)
        kind, host = command.word(1).lower(), command.word(2)
        parent = Parent(command.directive, int(weight), kind, host, int(port), user, password)
        entries[-1].parents.append(parent)

    def _address(self, command: Command) -> None:
        address = command.word(0)
        is_path = command.name == "internal" and address.startswith("unix:")
        if not (networks.is_network(address) and "/" not in address) and not is_path:
            self._notes.lost(command.directive, "is not an address")
            return
        self._notes.carried(command.directive)
        if command.name == "internal":
            self._state = self._state._replace(internal=address)
        elif self._state.external and ":" in address:
            self._notes.changed(command.directive, "a listener has one address to bind")
            return
        else:
            self._state = self._state._replace(external=address)
        self._state = self._state._replace(origins=(*self._state.origins, command.directive)[-4:])

    def _maxconn(self, command: Command) -> None:
        number = command.word(0)
        if not number.isdigit() or not int(number):
            self._notes.lost(command.directive, "is not a number")
            return
        self._notes.carried(command.directive)
        self._state = self._state._replace(maxconn=int(number))

    def _exception(self, command: Command) -> None:
        self._notes.lost(command.directive, "limits have no exceptions")

    # -- TLS of clients

    def _tls_file(self, command: Command) -> None:
        keys = {"cert": "certificate", "key": "key", "ca_file": "client_ca", "verify": "verify"}
        key = keys.get(command.name.removeprefix("ssl_server_"))
        if key is None:
            self._notes.unneeded(command.directive, "TLS has the defaults of Python")
            return
        self._notes.carried(command.directive)
        self._certificate[key] = command.word(0)

    def _tls(self, command: Command) -> None:
        if "certificate" not in self._certificate:
            self._notes.lost(command.directive, "no ssl_server_cert comes before it")
            return
        self._notes.carried(command.directive)
        names = ("certificate", "key", *(["client_ca"] if "verify" in self._certificate else []))
        tls = tuple((n, self._certificate[n]) for n in names if self._certificate.get(n))
        self._state = self._state._replace(tls=tls)

    def _no_tls(self, command: Command) -> None:
        self._notes.carried(command.directive)
        self._state = self._state._replace(tls=())

    # -- names, times and the log

    def _name_server(self, command: Command) -> None:
        address, slash, network = command.word(0).partition("/")
        host, colon, port = (
            address.rpartition(":") if address.count(":") == 1 else (address, "", "")
        )
        host = host.strip("[]")
        if not networks.is_host(host) or (slash and network.lower() != "tcp"):
            self._notes.lost(command.directive, "is not the address of a name server")
            return
        self._notes.carried(command.directive)
        text = networks.listen_text(host, port) if colon else host
        section = self._draft.sections.get("dns")
        servers = section.settings.get("servers", []) if section else []
        assert isinstance(servers, list)
        listed: list[Value] = [*servers, f"tcp://{text}" if slash else text]
        self._draft.put("dns.servers", listed, command.directive)

    def _cache(self, command: Command) -> None:
        if command.word(0).isdigit():
            self._draft.put("dns.cache", int(command.word(0)), command.directive)
        self._notes.carried(command.directive)

    def _record(self, command: Command) -> None:
        name, address = command.word(0), command.word(1)
        if not networks.is_network(address) or "/" in address:
            self._notes.lost(command.directive, "is not the address of a name")
            return
        self._notes.carried(command.directive)
        addresses: list[Value] = [] if address in ("0.0.0.0", "::") else [address]
        section = self._draft.sections.get("dns")
        hosts = section.settings.get("hosts", {}) if section else {}
        assert isinstance(hosts, dict)
        self._draft.put("dns.hosts", {**hosts, name: addresses}, command.directive)

    def _timeouts(self, command: Command) -> None:
        self._notes.carried(command.directive)
        for at, path in _TIMES:
            number = command.word(at)
            if number.isdigit() and 0 < int(number) <= _LONGEST:
                self._draft.put(path, f"{number}s", command.directive)

    def _log(self, command: Command) -> None:
        why = "netproxyd writes its log to standard error, which the service manager keeps"
        if command.word(0, "@").startswith("@"):
            self._notes.unneeded(command.directive, why)
        else:
            advice = "log.file is a file for finished connections"
            self._notes.changed(command.directive, why, advice)
