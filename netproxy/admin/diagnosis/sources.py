"""Tells which local address flows leave from: the lines of netproxyd -t and --explain.  Pure."""

from __future__ import annotations

from netproxy.config.schema import HopConfig
from netproxy.dialer.direct import DirectDialer
from netproxy.router.auto import AutoDialer
from netproxy.typed import TYPE_CHECKING, Iterator

if TYPE_CHECKING:
    from netproxy.config.schema import Config, ListenerConfig, UpstreamConfig
    from netproxy.interfaces.flows import Flow
    from netproxy.interfaces.routing import Dialer


def user_lines(config: Config) -> list[str]:
    """Return a line for each user with a bind."""
    return [
        f"user {name}: directly from {user.bind}"
        for name, user in config.users.items()
        if user.bind is not None
    ]


def listener_text(listener: ListenerConfig) -> str:
    """Return ", directly from ..." for a listener with a bind, else ""."""
    return f", directly from {listener.bind}" if listener.bind is not None else ""


def upstream_text(upstream: UpstreamConfig) -> str:
    """Return the binds of an upstream's first hops, "" for none."""
    binds = dict.fromkeys(str(hop.bind) for hop in upstream.hops if hop.bind is not None)
    return " or ".join(binds)


def explained(
    config: Config, dialer: Dialer, upstream: UpstreamConfig | None, flow: Flow
) -> Iterator[str]:
    """Yield the line that tells where a flow leaves from; nothing if no bind concerns it.

    `upstream` is what `dialer` was built from, None if it is not in the configuration.
    """
    if upstream is not None and (text := upstream_text(upstream)):
        yield f"from: {text} (bind of the upstream)"
        return
    if isinstance(dialer, AutoDialer):
        dialer = dialer.preferred_dialer(flow)
    if not (isinstance(dialer, DirectDialer) or (upstream is not None and _is_direct(upstream))):
        return
    user = config.users.get(flow.user)
    if user is not None and user.bind is not None:
        yield f"from: {user.bind} (users.{flow.user}.bind)"
        return
    for listener in config.listeners:
        if listener.name == flow.listener and listener.bind is not None:
            yield f"from: {listener.bind} (bind of listener '{listener.name}')"


def _is_direct(upstream: UpstreamConfig) -> bool:
    """Return whether an upstream is `direct`, with whatever options."""
    return all(isinstance(step, HopConfig) and step.scheme == "direct" for step in upstream.steps)
