"""A plan: everything that one configuration runs on, built and ready to be put into force.

bind() does what may fail: it binds sockets and starts threads.  commit() puts the plan
into force in place of the one before and cannot fail.  A plan that is only asked
(netproxyd -t, --explain) is never bound; asking changes nothing.  Thread: main, except
describe(), explain() and what only reads.
"""

from __future__ import annotations

import os

from netproxy.access.backoff import Penalty
from netproxy.access.factory import PreparedCounts
from netproxy.config.schema import Config, HopConfig, UpstreamConfig
from netproxy.config.used import used_upstreams
from netproxy.daemon.own_sockets import ExpectedSockets, own_sockets, wanted_sockets
from netproxy.daemon.runtime import connection_threads
from netproxy.listener.udp import UdpListener
from netproxy.router.router import Fallbacks
from netproxy.typed import TYPE_CHECKING, Callable, Mapping, NamedTuple, Protocol, Sequence, TypeVar

if TYPE_CHECKING:
    from netproxy.access.destinations import DestinationPolicy
    from netproxy.access.external.logins import ExternalLogins
    from netproxy.access.limits import Admission
    from netproxy.access.permission import Permission
    from netproxy.admin.servers import Admin
    from netproxy.daemon.listening.announcements import Announcements
    from netproxy.daemon.tunnels.lazy import LazyTunnels
    from netproxy.daemon.runtime import Runtime
    from netproxy.daemon.listening.udp_relays import UdpRelays
    from netproxy.dialer.factory import DialerFactory
    from netproxy.handler.factory import HandlerDependencies
    from netproxy.interfaces.routing import Dialer, FakeAddresses, UserUpstreams
    from netproxy.interfaces.services import PreparedChange
    from netproxy.listener.manager import ListenerManager, ListenerSpec
    from netproxy.listener.pool import ThreadPool
    from netproxy.listener.tcp import TcpListener
    from netproxy.resolver.forwarder import DnsForwarder
    from netproxy.resolver.resolver import LookupPlan
    from netproxy.router.router import RuleRouter

    AnyListener = TcpListener | UdpListener

Change = TypeVar("Change", bound="PreparedChange")


class Renewal(Protocol):
    """TLS files that were read again."""

    def commit(self) -> None:
        """Use the new contents for new connections."""


class Plan(NamedTuple):
    """What daemon.build.build() makes of a configuration; never changed."""

    config: Config
    runtime: Runtime
    dialers: DialerFactory
    """Shared with the plan before unless `timeouts.connect` has changed, so that UDP sessions,
    which hold their dialer, go on."""
    renewal: Renewal | None
    """The TLS files of upstreams that `dialers` had read before, read again; None without."""
    lookups: LookupPlan
    """How names are looked up."""
    forwarder: DnsForwarder | None
    """Asks the configured name servers; None if the system is asked."""
    policies: Mapping[str, DestinationPolicy]
    """Where clients may be led, by the listener's name."""
    fakes: FakeAddresses | None
    """The addresses that dns listeners answer in place of those of names; None for none."""
    router: RuleRouter
    dependencies: HandlerDependencies
    relays: UdpRelays
    announcements: Announcements
    """The addresses to announce that are found while the daemon runs."""
    admissions: Mapping[str, Admission]
    """By the listener's name; those of earlier configurations as well, so that a listener that
    comes back knows the connections that it still has."""
    specs: Sequence[ListenerSpec]
    permissions: Sequence[Permission]
    """What the clients of each listener may do, for each of its addresses."""
    tunnels: LazyTunnels
    """The same in all plans of a daemon."""
    warnings: Sequence[str]
    """What the configuration allows although it cannot work, or should not be so."""

    def bind(self, manager: ListenerManager[AnyListener], admin: Admin) -> BoundPlan:
        """Bind and start everything that is new, in the order given in BoundPlan.

        Raises ListenError if a socket cannot be bound or no thread can be had, ConfigError if a
        file of the tunnel's agent has changed since build(); then everything is as it was.
        """
        return BoundPlan(self, manager, admin)

    def close(self) -> None:
        """Close the connections to name servers."""
        if self.forwarder is not None:
            self.forwarder.close()

    def named_upstreams(self) -> dict[str, UpstreamConfig]:
        """Return the upstreams by name; "default" is the default if it has no name of its own."""
        default = {} if self.config.default.name else {"default": self.config.default}
        return {**default, **self.config.upstreams}


class BoundPlan:
    """A plan whose sockets are bound and whose threads run.  Call commit() or discard() once.

    **Binding** goes from what is easiest to undo to what clients see:

    1. The addresses of new sockets count as the daemon's own, as far as the file tells them: no
       client is led there from the moment that they accept.
    2. The control socket and the metrics listener.  The latter answers from now on, so that a
       program that asks whether the daemon is ready hears that it is not.
    3. The thread of a new tunnel agent, which connects nowhere yet.
    4. The file of what users have moved is opened.
    5. The limit of connection threads, if it grows: new listeners must not wait for threads.
    6. The listeners, last.  Their threads run, but take nothing yet.

    If a step fails, the steps before it are undone in reverse, and the error is raised.

    **Committing** cannot fail.  Its order:

    1. Listeners that stay get their new handlers and limits, those that are gone are stopped.
       From here on every new connection meets the new configuration.  No handler of the plan
       before is used for a new connection any more, so that the rest may replace what it used.
    2. TLS files of upstreams, lookups, destination policies, the daemon's own sockets, the
       permissions of connections that began with earlier configurations, limits and penalties.
    3. The limit of connection threads, if it shrinks; the memory of `via: auto`.
    4. Upstreams that are gone are forgotten, health checks follow those that are left.
    5. The janitor looks after new UDP listeners and name servers instead of those that are gone.
    6. UDP relays: new limits, and the sessions of addresses that are gone end.  Their sockets
       were stopped in step 1, so that no datagram opens another one.  Then announcements: the
       addresses that are announced for listeners, as far as they are found.
    7. Tunnels: agents' ports get their new handlers, a new agent connects.
    8. New listeners take what comes: all that decides about their clients is in force by now.
    9. The control socket and the metrics listener.  The ones that are gone stop; a client that
       asked for this very reload over a control socket that is gone is still answered.
    """

    def __init__(self, plan: Plan, manager: ListenerManager[AnyListener], admin: Admin) -> None:
        """Bind everything.  Raises ListenError or ConfigError, and then has undone itself."""
        self.plan = plan
        self._prepared: list[PreparedChange] = []
        runtime = plan.runtime
        try:
            expected = ExpectedSockets(runtime.own, wanted_sockets(plan.config))
            self._expected = self._keep(expected)
            self._servers = self._keep(admin.bind(plan.config))
            self._tunnels = self._keep(
                plan.tunnels.prepare(plan.config, plan.dependencies, plan.dialers)
            )
            threads = connection_threads(plan.config)
            counting, log = runtime.counting, runtime.log
            counts = PreparedCounts(plan.config, counting, os.environ, log)
            self._counts = self._keep(counts)
            self._threads = self._keep(_ThreadLimit(runtime.connections, threads))
            given = runtime.given
            specs = [spec for spec in plan.specs if given.is_served(spec.network, spec.address)]
            self._listeners = self._keep(manager.bind(specs))
        except BaseException:
            self.discard()
            raise

    def commit(self, previous: Plan) -> list[AnyListener]:
        """Put the plan into force in place of the one before; see above for the order.

        Returns the listeners that were stopped; their connections may still be running.
        """
        plan, runtime, config = self.plan, self.plan.runtime, self.plan.config
        self._listeners.commit()
        if plan.renewal is not None:
            plan.renewal.commit()
        own = own_sockets(plan.config, self._listeners.listeners) + self._servers.sockets
        runtime.reachability.configure(plan.lookups, plan.policies, own, config.dns.fake.networks)
        runtime.names.fakes_in_force = plan.fakes
        runtime.permissions.commit(plan.permissions, plan.router)
        self._counts.commit()
        runtime.back_off.rules = Penalty(*plan.config.penalty)
        self._expected.commit()
        self._threads.commit()
        runtime.verdicts.configure(config.auto.remember, config.auto.entries)
        plan.dialers.retain(used_upstreams(plan.config))
        runtime.check_health([check for group in plan.dialers.groups() for check in group.checks])
        self._hand_over_to_janitor(previous)
        plan.relays.commit(previous.relays)
        plan.announcements.commit(previous.announcements, self._listeners.pairs)
        plan.tunnels.use_listeners(self._listeners.listeners)
        self._tunnels.commit()
        self._listeners.begin()
        self._servers.commit()
        for warning in plan.warnings:
            runtime.log.warning("%s", warning)
        return self._listeners.gone

    def discard(self) -> None:
        """Undo the binding, the last step first."""
        for change in reversed(self._prepared):
            change.discard()

    def _keep(self, change: Change) -> Change:
        """Remember a change for discard()."""
        self._prepared.append(change)
        return change

    def _hand_over_to_janitor(self, previous: Plan) -> None:
        janitor = self.plan.runtime.janitor
        for listener in self._listeners.gone:
            if isinstance(listener, UdpListener):
                janitor.unregister(listener)
        for listener in self._listeners.fresh:
            if isinstance(listener, UdpListener):
                janitor.register(listener)
        if self.plan.forwarder is not None:
            janitor.register(self.plan.forwarder)
        if previous.forwarder is not None:
            janitor.unregister(previous.forwarder)
            previous.close()


class _ThreadLimit:
    """Another limit of a thread pool: a higher one counts at once, a lower one from commit()."""

    def __init__(self, pool: ThreadPool, limit: int) -> None:
        self._pool, self._limit, self._before = pool, limit, pool.limit
        pool.limit = max(self._before, limit)

    def commit(self) -> None:
        self._pool.limit = self._limit

    def discard(self) -> None:
        self._pool.limit = self._before


def make_fallbacks(
    config: Config,
    dialer: Callable[[UpstreamConfig], Dialer],
    external: ExternalLogins | None = None,
) -> Fallbacks:
    """Return the upstreams of flows that no rule decides.  `external` names some of users."""
    by_listener = {
        listener.name: dialer(listener.upstream)
        for listener in config.listeners
        if listener.upstream
    }
    by_user: UserUpstreams = {
        name: (f"users.{name}.upstream", dialer(user.upstream))
        for name, user in config.users.items()
        if user.upstream
    }
    if external is not None and config.auth.names_upstreams:
        # late: few configurations have an external check
        from netproxy.access.external.upstreams import GrantedUpstreams

        block = dialer(UpstreamConfig((HopConfig("block"),)))
        named = {name: dialer(upstream) for name, upstream in config.upstreams.items()}
        named |= {"direct": dialer(UpstreamConfig()), "block": block}
        by_user = GrantedUpstreams(by_user, config.users, external.answers, named, missing=block)
    return Fallbacks(dialer(config.default), by_listener, by_user)
