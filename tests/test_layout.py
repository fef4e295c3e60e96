"""The shape of the package, read from its source: imports between rooms, lengths, docstrings.

mypy --strict and ruff, which tests/run calls, check types and style.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Iterator, NamedTuple

import pytest

pytestmark = pytest.mark.many_inputs

ROOT = Path(__file__).resolve().parents[1] / "netproxy"

# What a room's modules may import from other rooms.  errors, interfaces, typed and the own room
# are always allowed.  "" is the package itself, that is, its version.
LEAVES = {"config", "protocol", "net", "access", "observe", "router"}
ALLOWED = {
    "__main__": {"cli"},
    "cli": {"", "daemon", "ctl", "access", "admin"},
    "ctl": {"", "admin", "access", "observe", "config"},
    "daemon": {
        "",
        "admin",
        "handler",
        "listener",
        "tunnel",
        "resolver",
        "dialer",
        "relay",
        "public_address",
        "remote_lists",
        *LEAVES,
    },
    "admin": {"", "dialer", *LEAVES},
    "handler": {"protocol", "net", "relay", "access"},
    "dialer": {"protocol", "net"},
    "tunnel": {"protocol", "net"},
    "resolver": {"protocol", "net"},
    "relay": {"net"},
    "listener": {"net"},
    "public_address": {"protocol", "net"},
    "remote_lists": {"net"},
    "": set(),
    "errors": set(),
    "typed": set(),
    "interfaces": set(),
    **{room: set() for room in LEAVES},
}
FOR_ALL = {"errors", "interfaces", "typed"}
SCHEMA = "netproxy.config.schema"
READERS_OF_SCHEMA = {"daemon", "admin", "config", "ctl"}  # and every factory
LATE = {
    *("yaml", "ssl", "ctypes", "hashlib", "hmac", "argparse", "difflib", "json", "getpass"),
    *("grp", "pwd"),
    *("cryptography.exceptions", "cryptography.hazmat.primitives.ciphers.aead"),
    *("_hashlib", "_blake2", "maxminddb", "glob", "copy", "weakref"),
    "signal",  # a signal during its import would end the process
    "re",
}
# Modules of ours that few daemons need, and that cost start-up time or memory.
LATE_OURS = {
    *("netproxy.admin.accounts", "netproxy.admin.commands"),
    *("netproxy.admin.control.server", "netproxy.admin.diagnosis.explain"),
    *("netproxy.admin.diagnosis.rows",),
    *("netproxy.admin.listing", "netproxy.admin.flow_commands", "netproxy.admin.diagnosis.why"),
    *("netproxy.admin.diagnosis.dial_test",),
    *("netproxy.admin.web.http_server", "netproxy.admin.web.site", "netproxy.admin.web.pac"),
    *("netproxy.admin.stats.snapshot", "netproxy.admin.stats.stats"),
    *("netproxy.access.removals", "netproxy.access.users", "netproxy.daemon.main"),
    *("netproxy.admin.control.places", "netproxy.daemon.process.options"),
    "netproxy.daemon.process.configuring",
    *("netproxy.access.accounts.usage_file", "netproxy.access.accounts.usage_store"),
    # of several worker processes
    *("netproxy.access.accounts.collector", "netproxy.access.accounts.gauges"),
    *("netproxy.access.accounts.worker_usage", "netproxy.daemon.workers.parent"),
    *("netproxy.daemon.tunnels.tunnels", "netproxy.ctl.command_line", "netproxy.ctl.top"),
    *("netproxy.daemon.checks.lists", "netproxy.remote_lists.keeper"),
    *("netproxy.remote_lists.copies", "netproxy.resolver.client_names.fake_memory"),
    *("netproxy.daemon.checks.transparent", "netproxy.observe.writing.access_file"),
    *("netproxy.admin.nat.upstream", "netproxy.ctl.nat.command"),
    *("netproxy.ctl.convert.command",),
    *("netproxy.daemon.listening.finding", "netproxy.daemon.listening.notices"),
    *("netproxy.ctl.nft.command", "netproxy.handler.transparent.factory"),
    *("netproxy.handler.transparent.replies", "netproxy.handler.transparent.udp"),
    *(
        "netproxy.config.tree.hints",
        "netproxy.config.tree.syntax",
        "netproxy.config.sections.binds",
        "netproxy.config.sections.users",
        "netproxy.config.sections.users_file",
        "netproxy.config.sections.auth",
    ),
    *(
        "netproxy.access.external.command",
        "netproxy.access.external.factory",
        "netproxy.access.external.service",
        "netproxy.access.external.upstreams",
    ),
    *("netproxy.daemon.checks.certificates",),
    *("netproxy.access.checks.lanes", "netproxy.access.checks.passwords"),
    *("netproxy.daemon.questions", "netproxy.protocol.proxy_protocol"),
    "netproxy.resolver.client_names.name_memory",
    *("netproxy.config.sections.listener.routes", "netproxy.handler.sni.factory"),
    *("netproxy.router.port_routes.factory", "netproxy.admin.diagnosis.port_routes"),
    *("netproxy.listener.sockets.unix",),
    *("netproxy.dialer.plain.command", "netproxy.dialer.plain.programs"),
    *("netproxy.dialer.plain.unix",),
    *(
        "netproxy.config.sections.tunnel.tunnels",
        "netproxy.config.sections.dns",
        "netproxy.config.sections.rules",
    ),
    *("netproxy.dialer.web.http", "netproxy.dialer.socks4", "netproxy.dialer.socks5"),
    *("netproxy.handler.datagrams.bound_service", "netproxy.dialer.web.bound_udp"),
    *("netproxy.handler.datagrams.stream_service", "netproxy.handler.datagrams.uot"),
    *("netproxy.handler.http", "netproxy.handler.http_forward"),
    *("netproxy.dialer.group", "netproxy.dialer.health", "netproxy.dialer.hop"),
    *("netproxy.dialer.member", "netproxy.dialer.schemes", "netproxy.dialer.trust"),
    *("netproxy.handler.forward", "netproxy.access.sources"),
    *("netproxy.handler.transparent.sniffer", "netproxy.handler.dns.factory"),
    *("netproxy.handler.dns.remembering", "netproxy.router.named"),
    *("netproxy.dialer.plain.rotation", "netproxy.dialer.plain.source_dialer"),
    *(
        "netproxy.dialer.uot",
        "netproxy.handler.dns.handler",
        "netproxy.net.mmsg",
        "netproxy.net.tls",
        "netproxy.net.tls_socket",
    ),
    *("netproxy.net.mmsg_arena",),
    # of tunnels with datagram paths
    *("netproxy.tunnel.path.agent", "netproxy.tunnel.path.bridge"),
    *("netproxy.tunnel.path.owner", "netproxy.tunnel.path.sealing"),
    *("netproxy.daemon.tunnels.direct", "netproxy.tunnel.direct.end"),
    *("netproxy.resolver.answer_cache", "netproxy.resolver.client_names.factory"),
    *("netproxy.resolver.client_names.fake_table", "netproxy.relay.table.written_addresses"),
    *("netproxy.resolver.factory", "netproxy.router.factory"),
}
NOT_IN_A_CODEC = {"socket", "ssl", "select", "threading", "time", "logging"}
OF_SOCKET_IN_A_CODEC = {"inet_ntop", "inet_pton", "AF_INET", "AF_INET6"}

# Folders whose modules show or compare dates, and such modules of other folders. All others
# measure time with time.monotonic().
DATED = {
    "admin",
    "admin/diagnosis",
    "admin/stats",
    "admin/web",
    "ctl",
    "observe",
    "observe/writing",
    "tunnel/control",
    "daemon/checks",
}
DATED_MODULES = {"netproxy.access.accounts.usage", "netproxy.access.accounts.standing"}
DATED_MODULES |= {"netproxy.remote_lists.keeper"}  # the age of a file

MODULE_LINES, FUNCTION_LINES, LINE = 300, 60, 100
PARAMETERS, CONSTRUCTOR_PARAMETERS = 5, 7
ENTRIES, LOOSE_MODULES = 14, 4
# Modules of up to 500 lines, each with what cannot be cut apart.
LONG_LINES = 500
# Of all modules together.  Lambdas have no name, and Any has no type.
LAMBDAS, LINES_WITH_ANY = 40, 40
LONG_MODULES: dict[str, str] = {
    "netproxy.interfaces.answers": "one wire format: the answers of the control socket",
    "netproxy.listener.poller": "one lock: what the epoll watches, told by one thread",
    "netproxy.net.connect": "one lock: the dials that may be aborted, which connect() notes",
    "netproxy.net.frames.framed": "one lock and one queue, which both roles of a stream share",
    "netproxy.net.local.routes": "one request of rtnetlink, and the trial that stands in for it",
    "netproxy.net.stream": "one connection: its bytes, its deadline and the need for more",
    "netproxy.protocol.dns": "one RFC: messages of RFC 1035 with RFC 6891",
    "netproxy.protocol.stun": "one RFC: messages of RFC 8489 with those of RFC 5780",
    "netproxy.protocol.tunnel": "one wire format",
    "netproxy.tunnel.path.agent": "one lock: an agent's paths, and the one socket that they share",
    "netproxy.tunnel.path.path": "one lock: the keys of a path, and whether it is up",
    "netproxy.relay.nat": "the one lock of the UDP relay, under which every event is applied",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Import(NamedTuple):
    module: str
    """As written, "netproxy.net.stream"."""
    name: str
    """What is imported from the module, "" for the module itself."""
    line: int
    late: bool
    """True within a function, or under `if TYPE_CHECKING`: no module waits for it."""
    typing: bool


class Module:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = module_name(path)
        self.room = room_of(self.name)
        self.text = path.read_text()
        self.tree = ast.parse(self.text)
        self.imports = list(self._imports(self.tree, False, False))
        self.functions = [
            node
            for node in ast.walk(self.tree)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        ]

    def _imports(self, node: ast.AST, late: bool, typing: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, "", child.lineno, late, typing)
            elif isinstance(child, ast.ImportFrom):
                assert not child.level, f"{self.path}:{child.lineno}: a relative import"
                for alias in child.names:
                    yield Import(child.module or "", alias.name, child.lineno, late, typing)
            is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from self._imports(child, late or is_function, typing or is_for_typing(child))

    def ours(self) -> Iterator[tuple[str, Import]]:
        """Yield the full names of our own modules that this module imports."""
        for imported in self.imports:
            if imported.module.split(".")[0] == "netproxy":
                full_name = f"{imported.module}.{imported.name}"
                yield (full_name if full_name in NAMES else imported.module), imported

    def public(self) -> Iterator[tuple[str, ast.ClassDef | Function]]:
        """Yield the public classes, functions and methods, with their names."""
        for node in self.tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield node.name, node
                for child in node.body:
                    if isinstance(child, ast.FunctionDef) and not child.name.startswith("_"):
                        yield f"{node.name}.{child.name}", child
            elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                yield node.name, node

    def at(self, node: ast.ClassDef | Function | Import) -> str:
        line = node.line if isinstance(node, Import) else node.lineno
        return f"{self.path.relative_to(ROOT.parent)}:{line}"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def room_of(name: str) -> str:
    return (name.split(".") + [""])[1]


def is_for_typing(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


def parameters(function: Function) -> list[ast.arg]:
    """Return all parameters except self and cls."""
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    every += filter(None, (given.vararg, given.kwarg))
    return every[1:] if every and every[0].arg in ("self", "cls") else every


PATHS = sorted(ROOT.rglob("*.py"))
NAMES = {module_name(path) for path in PATHS}
MODULES = [Module(path) for path in PATHS]


def test_every_room_has_an_import_rule() -> None:
    assert {module.room for module in MODULES} == set(ALLOWED)


def test_imports_go_downward_only() -> None:
    wrong = [
        f"{module.at(imported)}: {module.room or 'netproxy'} imports {name}"
        for module in MODULES
        for name, imported in module.ours()
        if room_of(name) not in ALLOWED[module.room] | FOR_ALL | {module.room} and name != SCHEMA
    ]
    assert not wrong


def test_only_factories_import_the_schema() -> None:
    wrong = [
        module.at(imported)
        for module in MODULES
        for name, imported in module.ours()
        if name == SCHEMA
        and module.room not in READERS_OF_SCHEMA
        and module.path.name != "factory.py"
    ]
    assert not wrong


def test_codecs_do_no_io() -> None:
    wrong = [
        f"{module.at(imported)}: {imported.module} {imported.name}"
        for module in MODULES
        if module.room == "protocol"
        for imported in module.imports
        if imported.module.split(".")[0] in NOT_IN_A_CODEC
        and not (imported.module == "socket" and imported.name in OF_SOCKET_IN_A_CODEC)
    ]
    assert not wrong


def test_imports_within_functions_are_the_costly_ones() -> None:
    wrong = []
    for module in MODULES:
        ours = {imported: name for name, imported in module.ours()}
        for imported in module.imports:
            allowed = LATE_OURS if imported in ours else LATE
            if imported.late and ours.get(imported, imported.module) not in allowed:
                wrong.append(f"{module.at(imported)}: {imported.module}")
    assert not wrong


def test_no_protocol_is_asked_at_run_time() -> None:
    """isinstance() with a Protocol is slow, and Python 3.12 reads the module inspect for it."""
    wrong = [
        module.at(imported)
        for module in MODULES
        for imported in module.imports
        if imported.name == "runtime_checkable"
    ]
    assert not wrong


def test_typing_is_for_type_checkers() -> None:
    """It takes 0.7 MiB of an idle daemon: netproxy.typed stands for it at run time."""
    wrong = [
        module.at(imported)
        for module in MODULES
        for imported in module.imports
        if imported.module == "typing" and not imported.typing
    ]
    assert not wrong


def test_few_functions_have_no_name() -> None:
    lambdas = [
        node for module in MODULES for node in ast.walk(module.tree) if isinstance(node, ast.Lambda)
    ]
    assert len(lambdas) <= LAMBDAS


def test_few_lines_have_no_type() -> None:
    lines = {
        f"{module.path}:{node.lineno}"
        for module in MODULES
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Name) and node.id == "Any"
    }
    assert len(lines) <= LINES_WITH_ANY


def test_no_import_is_circular() -> None:
    """Late imports, and those for type checkers, do not count: by then all modules exist."""
    imports = {
        module.name: {
            name for name, imported in module.ours() if not imported.late and not imported.typing
        }
        for module in MODULES
    }

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        for other in imports.get(name, set()):
            walk(other, (*path, name))

    for name in imports:
        walk(name, ())


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)
class TestModule:
    def test_module_is_short(self, module: Module) -> None:
        limit = LONG_LINES if module.name in LONG_MODULES else MODULE_LINES
        assert len(module.text.splitlines()) <= limit

    def test_lines_are_short(self, module: Module) -> None:
        lines = enumerate(module.text.splitlines(), 1)
        wrong = [f"{module.path}:{number}" for number, line in lines if len(line) > LINE]
        assert not wrong

    def test_functions_are_short(self, module: Module) -> None:
        wrong = [
            module.at(function)
            for function in module.functions
            if (function.end_lineno or 0) - function.lineno + 1 > FUNCTION_LINES
        ]
        assert not wrong

    def test_functions_take_few_parameters(self, module: Module) -> None:
        wrong = []
        for function in module.functions:
            limit = CONSTRUCTOR_PARAMETERS if function.name == "__init__" else PARAMETERS
            if len(parameters(function)) > limit:
                wrong.append(f"{module.at(function)}: {function.name}")
        assert not wrong

    def test_public_names_have_docstrings(self, module: Module) -> None:
        wrong = [
            f"{module.at(node)}: {name}"
            for name, node in module.public()
            if not ast.get_docstring(node)
        ]
        assert not wrong

    def test_module_has_a_docstring(self, module: Module) -> None:
        if module.text.strip() and module.path.name != "__init__.py":
            assert ast.get_docstring(module.tree)


@pytest.mark.parametrize(
    "folder", sorted({path.parent for path in PATHS} - {ROOT}), ids=lambda folder: folder.name
)
def test_room_has_few_modules(folder: Path) -> None:
    entries = [path for path in folder.iterdir() if path.name not in ("__pycache__", "__init__.py")]
    assert len(entries) <= ENTRIES


def test_package_has_few_loose_modules() -> None:
    loose = [path.name for path in ROOT.glob("*.py") if path.name != "__init__.py"]
    assert len(loose) <= LOOSE_MODULES


def test_package_files_are_empty_except_the_version() -> None:
    wrong = [
        str(module.path)
        for module in MODULES
        if module.path.name == "__init__.py" and module.path.parent != ROOT and module.text.strip()
    ]
    assert not wrong


def test_timers_do_not_use_the_system_clock() -> None:
    """Hazard 100."""
    wrong = [
        f"{module.path.relative_to(ROOT.parent)}:{node.lineno}"
        for module in MODULES
        if str(module.path.parent.relative_to(ROOT)) not in DATED
        if module.name not in DATED_MODULES
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("time.time", "time.time_ns")
    ]
    assert not wrong
