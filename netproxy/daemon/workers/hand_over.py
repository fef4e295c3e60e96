"""Hands connections over to the worker that must serve them.

All datagrams of a client come to one worker, so all its associations live there.  A plain
connection is given away whole, as a descriptor with the bytes read so far.  The state of TLS
cannot be given away: such a connection stays, and is relayed over a socket pair.

The worker that has accepted a connection counts it until its end, wherever it is served.  A
plain connection has a socket pair for that: the other worker has one end as long as it serves the
connection (listener.accepted.Lifetime).  Thread: any; nothing here waits.
"""

from __future__ import annotations

import math
import socket
from contextlib import suppress

from netproxy.daemon.workers.messages import Message, MessageError, association_fields, send
from netproxy.errors import DialError, Reason
from netproxy.interfaces.accounts import UNLIMITED
from netproxy.interfaces.addresses import ActivationAddress, Address
from netproxy.interfaces.connections import READABLE, Wait
from netproxy.interfaces.flows import Flow
from netproxy.listener.steering import owner
from netproxy.net import syscalls
from netproxy.net.stream import Stream, poll_watched
from netproxy.relay.pipe import PipeLimits, Relay
from netproxy.typed import TYPE_CHECKING, Callable, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces import connections
    from netproxy.interfaces.flows import LiveFlow
    from netproxy.relay.pipe import Outcome

Grant = tuple[str, Sequence[object]]
"""The upstream and the limits that an external check of logins has granted to a user."""
_ENDLESS = PipeLimits(math.inf, math.inf, splice=False)
"""The other worker decides how long a relayed connection may be idle."""


class HandOvers:
    """What this worker hands to the others."""

    def __init__(self, outboxes: Sequence[socket.socket]) -> None:
        """`outboxes`: the sending ends of all workers' inboxes.  use_index() must follow."""
        self._outboxes = outboxes
        self._index = 0
        self.joints = Joints()
        self.given: dict[connections.Stream, _GivenAway] = {}
        """The connections that others serve.  A worker that drains does not wait for them."""
        self.granted: Callable[[Flow], Grant | None] = _granted_nothing
        """Returns what an external check of logins has granted to the user of a flow."""

    def use_index(self, index: int) -> None:
        """Be the worker with this number from now on."""
        self._index = index

    @property
    def index(self) -> int:
        """The number of this worker."""
        return self._index

    @property
    def others(self) -> list[int]:
        """The numbers of the other workers."""
        return [worker for worker in range(len(self._outboxes)) if worker != self._index]

    def tell(self, worker: int, message: Message) -> None:
        """Send a message to another worker.  Raises MessageError."""
        send(self._outboxes[worker], message)

    def associations(self, listener: str, address: Address) -> ListenerAssociations:
        """Return what knows who has the associations of a listener's address."""
        return ListenerAssociations(self, listener, address)

    def is_own(self, worker: int) -> bool:
        """Return whether this process is a worker."""
        return worker == self._index

    def owner_of(self, client: str) -> int:
        """Return the worker that the datagrams of a client address come to."""
        return owner(client, len(self._outboxes))

    def give(
        self, worker: int, stream: connections.Stream, fields: dict[str, object]
    ) -> Wait | None:
        """Give a connection to another worker, in a message with these fields.

        Returns what this worker waits for until the connection has ended.  Raises MessageError,
        StreamError; then the connection is as it was, except for bytes that were read ahead.
        """
        try:
            near, far = socket.socketpair()
        except OSError as error:
            raise MessageError(error.strerror) from error
        with far:
            try:
                near.setblocking(False)
                if not stream.plain:
                    self.tell(worker, Message({**fields, "relayed": True}, b"", [far.fileno()]))
                    stream.handshaking = False
                    return self.joints.join(stream, Stream(near))
                sock, unread = stream.detach()
                self.tell(worker, Message(fields, unread, [sock.fileno(), far.fileno()]))
            except BaseException:
                near.close()
                raise
        # First: what ends the stream meanwhile ends either of the two.
        stand_in = _GivenAway(fileno=near.detach())
        stream.become(stand_in, syscalls)
        syscalls.close(sock)
        stream.hang_up, stream.handshaking = 0, False
        self.given[stream] = stand_in
        end = _End(self.given, stream, stand_in)
        stream.on_close(end.note)
        return end.wait

    def leave(self) -> None:
        """Let the others count what they serve: this worker ends."""
        for stand_in in list(self.given.values()):
            stand_in.leave()


class _GivenAway(socket.socket):
    """Stands in for a connection that another worker serves: readable once it has ended."""

    def shutdown(self, how: int) -> None:
        """Ask the other worker to end the connection.  Raises OSError if it has ended."""
        self.send(b"\0", socket.MSG_NOSIGNAL)

    def leave(self) -> None:
        """Let the other worker count the connection."""
        with suppress(OSError):
            super().shutdown(socket.SHUT_RDWR)


class _End:
    """The end of a connection that another worker has served."""

    def __init__(
        self,
        given: dict[connections.Stream, _GivenAway],
        stream: connections.Stream,
        stand_in: _GivenAway,
    ) -> None:
        self._given = given
        self._stream = stream
        self.wait = Wait(((stand_in, READABLE),), None, self.resume, step=self.step)

    def note(self) -> None:
        """Note that the connection has ended."""
        self._given.pop(self._stream, None)

    def resume(self, ready: bool) -> None:
        """Return nothing to wait for."""
        # Before this worker forgets the connection: else it could take another one for given.
        self.note()

    def step(self, descriptor: int, events: int) -> Wait | None:
        """Do the same, unless the event was about the last owner of the descriptor."""
        if not poll_watched(self.wait.watched, 0):
            return self.wait
        self.note()
        return None


class ListenerAssociations:
    """Who has the associations of one listening address (AssociationOwners)."""

    def __init__(self, hand_overs: HandOvers, listener: str, address: Address) -> None:
        self._hand_overs = hand_overs
        self._listener = listener
        self._address = address

    def is_elsewhere(self, client: str) -> bool:
        """Return whether another worker has those of a client address."""
        return not self._hand_overs.is_own(self._owner(client))

    def hand_over(self, control: connections.Stream, flow: Flow, reached: Address) -> Wait | None:
        """Give a control connection to the worker of its client (AssociationOwners)."""
        fields = association_fields(self._listener, self._address, flow, reached)
        if flow.port_route is not None:
            fields["accepted_by"] = flow.port_route.listener
        if grant := self._hand_overs.granted(flow):
            fields["grant"] = grant
        try:
            return self._hand_overs.give(self._owner(flow.client.host), control, fields)
        except MessageError as error:
            said = f"the worker of the client cannot be told: {error}"
            raise DialError(Reason.GENERAL, said=said) from error

    def _owner(self, client: str) -> int:
        # Worker 0 alone has the datagrams of an activation socket.
        if isinstance(self._address, ActivationAddress):
            return 0
        return self._hand_overs.owner_of(client)


def parse_given(
    message: Message, sockets: Sequence[socket.socket], seconds: float, ahead: bytes = b""
) -> tuple[Stream, socket.socket | None]:
    """Return the stream of a connection that another worker has given, limited to `seconds`.

    `ahead` comes before its unread bytes.  The second value tells the other worker of the end;
    None if it relays the connection.  Raises ValueError.
    """
    is_relayed = bool(message.fields.get("relayed"))
    sock, *lifetime = sockets
    if len(lifetime) == is_relayed:
        raise ValueError("not the descriptors of a connection")
    sock.setblocking(False)
    stream = Stream(sock, ahead + message.data, limited=seconds)
    return stream, None if is_relayed else lifetime[0]


class Joints:
    """The relays between this worker and others.  Thread: any."""

    def __init__(self) -> None:
        self._live: set[_Joint] = set()

    def __len__(self) -> int:
        return len(self._live)

    def join(self, client: connections.Stream, upstream: connections.Stream) -> Wait | None:
        """Relay between two streams until both have ended; return what the relay waits for."""
        joint = _Joint(self._live)
        return Relay(client, upstream, _ENDLESS, joint, _FreeAccount()).begin()


class _Joint:
    """The owner of a relay between two workers: the flow has its record elsewhere."""

    def __init__(self, live: set[_Joint]) -> None:
        self._live = live
        live.add(self)

    def relay_ended(self, outcome: Outcome) -> None:
        """Note the end."""
        self._live.discard(self)


class _FreePace:
    """The pace of what another worker paces (interfaces.accounts.Pace)."""

    mark = UNLIMITED
    lease = 0

    def renew(self, moved: int) -> int:
        return UNLIMITED - moved

    def delay(self) -> float:
        return 0.0

    def decided(self) -> str:
        return ""


class _FreeAccount:
    """The account of a relay between two workers: the flow is counted elsewhere."""

    def __init__(self) -> None:
        self.up, self.down = _FreePace(), _FreePace()

    def attach(self, live: LiveFlow) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def _granted_nothing(flow: Flow) -> Grant | None:
    """Return None: no login is checked by others."""
    return None
