"""Answers questions about a plan: what it would do, and what comes of trying it.

A plan that is only asked (netproxyd -t, --explain) is never bound; asking changes nothing of the
plan.  Thread: any.
"""

from __future__ import annotations

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import TUNNEL_AGENT
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.admin.diagnosis.dial_test import Paths
    from netproxy.config.schema import Config
    from netproxy.daemon.plan import Plan
    from netproxy.interfaces.answers import JsonObject
    from netproxy.interfaces.routing import Dialer


class PlanQuestions:
    """The questions about one plan."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def describe(self) -> list[str]:
        """Return what would listen and what each upstream carries, for netproxyd -t."""
        from netproxy.admin import listing  # late: few daemons are ever asked

        return list(listing.plan(self._plan.config, self._plan.dialers))

    def explain(self, flow: str) -> list[str]:
        """Return which rule and which upstream a flow would meet, as lines.

        May wait for a name lookup.  Raises FlowError.
        """
        from netproxy.admin.diagnosis import explain  # late: as above

        plan = self._plan
        asked = explain.AskedPlan(plan.config, plan.router, plan.dialers, plan.tunnels)
        return list(explain.explain(flow, asked, entrances(plan.config)))

    def probe_nat(self, upstream: str, servers: object) -> JsonObject:
        """Ask STUN servers through an upstream.  Blocks.  Raises NetProxyError."""
        from netproxy.admin.nat.upstream import probe_upstream  # late: as above

        arenas = self._plan.runtime.datagrams.arenas
        return probe_upstream(upstream, self._upstreams(), arenas, servers)

    def paths(self) -> Paths:
        """Return what a test of a target uses."""
        from netproxy.admin.diagnosis.dial_test import Paths  # late: as above

        plan, runtime = self._plan, self._plan.runtime
        return Paths(
            *(plan.config, plan.router, plan.dialers, self._upstreams(), entrances(plan.config)),
            *(runtime.datagrams.arenas, runtime.standing, runtime.dials),
        )

    def _upstreams(self) -> dict[str, Dialer]:
        """Return the dialers of the upstreams by name, with "direct" and those of all agents."""
        plan = self._plan
        built = plan.dialers.upstreams(plan.named_upstreams())
        seconds, bridge = plan.config.timeouts.connect, plan.config.tunnel.bridge
        agents = {
            f"tunnel://{agent}": plan.tunnels.dialer(Address(agent, 0), seconds)
            for agent in (bridge.agents if bridge is not None else ())
        }
        direct = plan.dialers.direct_within(seconds)
        return {"direct": direct, **agents, **{name: dialer for name, dialer, _ in built}}


def entrances(config: Config) -> dict[str, str]:
    """Return where flows come in: the listeners by name, and the tunnel's agent.

    Each with the reason why rules are not asked there, "" if they are.
    """
    names = {listener.name: "" for listener in config.listeners}
    if config.tunnel.agent is not None:
        is_exit = config.tunnel.agent.exit
        reason = "the agent is no exit, and leads to its services alone"
        names[TUNNEL_AGENT] = "" if is_exit else reason
    return names
