"""Makes the configuration of the file and of the command line together.

Loaded where a configuration is read: in the process of daemon.process.reading, and for
netproxyd -t and --explain.
"""

from __future__ import annotations

from netproxy.config.read import check, read_config
from netproxy.config.schema import Config
from netproxy.config.tree.load import load_file
from netproxy.config.tree.node import Node
from netproxy.config.tree.problems import Problems
from netproxy.config.url import listener_nodes
from netproxy.errors import ConfigError
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.daemon.process.options import Options


def configure(options: Options) -> Config:
    """Read the file and apply the options to it.  Raises ConfigError."""
    path = options.config
    root = load_file(path) if path else Node({}, "built-in configuration")
    if not isinstance(root.value, dict):
        raise ConfigError("must be a mapping of keys to values", root.place)
    tree, problems = dict(root.value), Problems()
    if options.listen or "listeners" not in tree or tree["listeners"].value == "":
        urls = options.listen or [options.default_listener]
        if not options.listen and (empty := tree.get("listeners")) is not None:
            message = f"listeners: is empty: {urls[0]} is served (for no listener write [])"
            problems.warn(message, empty.key_place or empty.place)
        tree["listeners"] = Node(listener_nodes(urls, problems), "-l")
    default_control = options.default_control
    is_default = bool(default_control.path) and "control" not in tree
    if is_default:
        tree["control"] = Node(f"unix:{default_control.path}", "the default")
    if options.workers is not None:
        tree["workers"] = Node(options.workers, "-w")
    if options.upstream is not None:
        hops = [Node(hop.strip(), "-u") for hop in options.upstream.split(",")]
        tree["default"] = Node(hops, "-u")
    config = check(read_config(Node(tree, root.place), problems), problems)
    if options.upstream is not None:
        listeners = tuple(listener._replace(upstream=None) for listener in config.listeners)
        users = {name: user._replace(upstream=None) for name, user in config.users.items()}
        auth = config.auth._replace(names_upstreams=False)
        config = config._replace(listeners=listeners, rules=(), users=users, auth=auth)
    if is_default:
        config = config._replace(control_required=default_control.required)
    level = "debug" if options.verbose else "warning" if options.quiet else config.log.level
    log_format = options.log_format or config.log.format
    return config._replace(log=config.log._replace(level=level, format=log_format))
