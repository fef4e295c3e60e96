"""What to do about a refusal or a failure, by its reason and by what has decided it.  Pure."""

from __future__ import annotations

from netproxy.errors import OF_OTHERS, Reason
from netproxy.interfaces.listeners import CLIENT_NOT_ALLOWED, CLIENT_RATE, EVICTED
from netproxy.typed import Mapping

_OF_A_HOP = (
    *(Reason.REFUSED.value, Reason.TIMEOUT.value, Reason.GENERAL.value),
    *(Reason.NETWORK_UNREACHABLE.value, Reason.HOST_UNREACHABLE.value),
)
_RULES_OF_A_HOP = "that proxy has refused: ask whoever runs it, or take another upstream"
_AT_A_HOP = "is that proxy up, and does it reach the target? netproxyctl upstreams"
# The words of resolver.client_names.fake_addresses and router.named, both decided by dns.fake.
_OF_FAKE_ADDRESSES = {
    "unknown fake address": "the address is one of dns.fake and stands for no name, or no more: "
    "ask the dns listener for the name again",
    "no fake address left": "give dns.fake a wider network, or fewer names",
}
# By the beginning of what has decided: the first that fits.
_BY_DECIDED = {
    "rules[": "change that rule, or put one above it that sends this flow elsewhere",
    "dns.rules[": "change that rule of dns, or put one above it for this name",
    "destinations.deny": "if clients may reach it, add the address to destinations.allow",
    "destinations": "if clients may reach it, set destinations.deny or destinations.allow",
    "own port": "the daemon's own ports are never reached through it: connect to them directly",
    "dns.fake": "the name server that dns.servers names must not be this daemon",
    "CONNECT to port": "CONNECT to this port is refused because of spam: use SOCKS5 instead",
    "netproxyctl ban": "take the ban back: netproxyctl unban NAME",
    "udp by": "see what carries UDP: netproxyd -t; udp: uot goes through any hop",
    "penalty": "wait for the end of the penalty, or correct the password that is tried",
    "clients_deny": "take the client out of clients_deny of this listener",
}
# Of dials; a client that is refused may have the same words.
_OF_A_DIAL: Mapping[str, str] = {
    Reason.NAME.value: "check the name, and the name servers: netproxyctl explain NAME",
    Reason.REFUSED.value: "nothing listens at that port, or a firewall refuses: "
    "try it from this machine",
    Reason.TIMEOUT.value: "no answer came within timeouts.connect: a firewall may drop packets; "
    "try another way: netproxyctl test TARGET --via UPSTREAM",
    Reason.NETWORK_UNREACHABLE.value: "this machine has no route: ip route get ADDRESS",
    Reason.HOST_UNREACHABLE.value: "a router says that the host is not there: is it up?",
    Reason.AUTHENTICATION.value: "check user and password in the URL of the upstream",
    Reason.PROTOCOL.value: "check the scheme and the port in the URL of the upstream",
    Reason.UNSUPPORTED.value: "see what the upstream carries: netproxyd -t, netproxyctl upstreams",
    Reason.LOOP.value: "do not send the daemon's own address through itself",
    Reason.LIMIT.value: "raise the limit, or wait until something ends: netproxyctl connections",
    Reason.DENIED.value: "see which rule decides: netproxyctl explain TARGET",
    Reason.GENERAL.value: "see the upstreams and the log: netproxyctl upstreams",
    **dict.fromkeys(OF_OTHERS, _RULES_OF_A_HOP),
    OF_OTHERS[-1]: "a firewall of this machine refuses: nft list ruleset, iptables -L OUTPUT",
}
_BY_REASON: Mapping[str, str] = {
    CLIENT_NOT_ALLOWED: "if it may connect, add its network to clients of this listener",
    CLIENT_RATE: "raise limits.connection_rate_per_client of this listener",
    EVICTED: "raise limits.connections of this listener",
    "connection limit": "raise limits.connections of this listener",
    "client limit": "raise limits.connections_per_client of this listener",
    "too many handshakes": "raise limits.handshakes of this listener, or find who connects so much",
    "no thread": "this machine has no thread left: see TasksMax= of the unit and ulimit -u",
    "no descriptor": "raise the limit of open files: LimitNOFILE= of the unit, ulimit -n",
    "listener removed": "a reload has taken the listener away: connect again",
    "login required": "the client must send a user name and a password",
    "proxy authentication required": "the client must send a user name and a password",
    "user removed": "a reload has removed this user",
    "password changed": "log in with the new password",
    "wrong login": "check name and password; a new hash is made by netproxyctl hash-password",
    "refused": "check name and password; a new hash is made by netproxyctl hash-password",
    "penalty": "wait for the end of the penalty, or correct the password that is tried",
    "unavailable": "the check of logins does not keep up, or fails: see the log",
    "user banned": "take the ban back: netproxyctl unban NAME",
    "client banned": "take the ban back: netproxyctl unban NAME",
    "user expired": "set a later day in expires of this user",
    "quota used up": "raise the quota of this user, or wait for its next period",
    "connection limit of the user": "raise limits.connections of this user: netproxyctl limit",
    "connection rate of the user": "raise limits.connection_rate of this user: netproxyctl limit",
    "session limit": "raise limits.sessions of the user, or udp.max_sessions of the listener",
    "rate limit": "raise the rate of the user or of the listener: netproxyctl limit",
    "unknown sender": "no client with a SOCKS5 association sends from there: "
    "it must send from the address of its TCP connection",
    "fragment": "the client fragments SOCKS5 datagrams, which no proxy must support",
    "malformed": "the client does not send what the port expects: check its protocol",
    "bad protocol": "the client does not speak the protocol of this port: check its setting",
    "cannot be served": "the daemon has no descriptor left: raise LimitNOFILE= of the unit",
    "bad request": "the client does not speak the protocol of this port: check its setting",
    "timed out": "the client has sent nothing in time: timeouts.handshake",
    "not redirected": "connect by the rules of the kernel: netproxyctl nft --check",
    "loop": "the daemon's own traffic comes back: netproxyctl nft --check",
    "filtered": "a stranger has sent: udp.filtering of this listener lets it in or not",
    "no context": "a stranger has sent, and the client has registered its targets alone",
    "rerouted": "a reload leads the target to another upstream: the client is to begin again",
    "too many contexts": "the client registers over 256 targets at a time in one stream",
    "too many answers": "the other end of a stream for all targets reads nothing",
    "waiting queue full": "the upstream or the name takes long: netproxyctl upstreams",
    "target failed": "the target has answered with an error: is something listening there?",
    "upstream failed": "see why the upstream fails: netproxyctl upstreams",
}


def advice(reason: str, decided: str, of_flow: bool = False, hop: str = "") -> str:
    """Return what to do, "" if there is nothing to say that the reason does not say.

    `of_flow`: it is about a flow, not about a client or a request.  `hop`: the proxy that failed
    or that reported the failure.
    """
    if hop and reason in _OF_A_HOP:
        return _AT_A_HOP
    if reason in _OF_FAKE_ADDRESSES:
        return _OF_FAKE_ADDRESSES[reason]
    for start, text in _BY_DECIDED.items():
        if decided.startswith(start):
            return text
    return (_OF_A_DIAL.get(reason, "") if of_flow else "") or _BY_REASON.get(reason, "")
