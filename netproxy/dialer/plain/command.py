"""The upstream that is a program: its standard input and output are the connection to the target.

Such programs are known from ssh_config(5) as ProxyCommand: "ssh -W [%h]:%p gate.example".
One program runs for each connection and is ended with it.  Dials run on the thread that asks.
"""

from __future__ import annotations

import re

from netproxy.errors import DialError, Reason
from netproxy.net.stream import Stream
from netproxy.typed import TYPE_CHECKING, NoReturn, Sequence

if TYPE_CHECKING:
    from netproxy.dialer.plain.programs import Programs
    from netproxy.interfaces.flows import Flow

# Names and addresses, and nothing that a program could take for an option, or a shell for more
# than a word.
_HOST = re.compile(r"[A-Za-z0-9_.:][A-Za-z0-9_.:%-]{0,254}\Z")
_ESCAPE = re.compile(r"%(.)")


class CommandDialer:
    """A dialer whose connections are programs."""

    carries = frozenset({"tcp"})
    refusal = Reason.UNSUPPORTED
    symmetric = knows_bound = False
    resolves_names = True

    def __init__(
        self, name: str, label: str, command: Sequence[str], limit: int, programs: Programs
    ) -> None:
        """Run at most `limit` programs at once.  `label` names the upstream in errors.

        `command` is the path of the program and its arguments, with %h, %p and %%.
        """
        self.name = name
        self._label = label
        self._command = tuple(command)
        self._limit = limit
        self._programs = programs

    def fixed_for(self, flow: Flow) -> CommandDialer:
        """Return the dialer itself."""
        return self

    def dial(self, flow: Flow) -> Stream:
        """Start the program for the flow's target.  Raises DialError.

        Whether the target can be reached is known to the program alone: it ends if not.
        """
        target = flow.target
        if not _HOST.match(target.host):
            said = "the host is not fit for an argument of a program"
            raise DialError(Reason.DENIED, "", said, self._label, decided="upstreams.NAME.command")
        values = {"h": target.host, "p": str(target.port), "%": "%"}
        arguments = [
            _ESCAPE.sub(lambda match: values.get(match[1], match[0]), argument)
            for argument in self._command
        ]
        sock, program = self._programs.start(self._label, arguments, self._limit)
        stream = Stream(sock)
        stream.hang_up = 0
        stream.on_close(program.end)
        return stream

    def dial_packet(self, flow: Flow) -> NoReturn:
        """Raise DialError(UNSUPPORTED): a program carries one stream."""
        raise DialError(Reason.UNSUPPORTED, said=f"{self._label} carries no UDP")
