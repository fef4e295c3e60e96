"""What the listeners of all conversions have in common: who may connect, and the login.  Pure."""

from __future__ import annotations

from netproxy.ctl.convert.terms.networks import EVERYBODY, is_loopback
from netproxy.typed import TYPE_CHECKING, Sequence

if TYPE_CHECKING:
    from netproxy.ctl.convert.draft.draft import Draft, Entry
    from netproxy.ctl.convert.notes import Notes

GUARDED = "to other machines' clients netproxyd refuses targets on loopback, link-local addresses"
_DESTINATIONS = (
    "which the old program may have allowed (write destinations: {deny: []} to allow them)"
)


def permit(entry: Entry, clients: Sequence[str] | None) -> None:
    """Let these networks connect to a listener; None is everybody.

    A listener that everybody may use is refused without allow_open.
    """
    settings = entry.settings
    listed = [] if clients is None else list(clients)
    host = str(settings["listen"]).rpartition(":")[0]
    is_local = is_loopback(host) or str(settings["listen"]).startswith("unix:")
    if listed and not set(EVERYBODY) <= set(listed):
        settings["clients"] = [*listed]
    elif not is_local and settings.get("auth") != "required":
        settings["allow_open"] = True
        entry.comments.append("everybody may connect, as before: better name the networks, or auth")


def free_name(draft: Draft, protocol: str, listen: str) -> str:
    """Return a name for a listener that is to be added: protocol and port, with a number if taken.

    It is the name that the listener has by itself, unless there is a number.
    """
    name = base = default_name(protocol, listen)
    taken = {_name(entry) for entry in draft.listeners}
    number = 2
    while name in taken:
        name, number = f"{base}-{number}", number + 1
    return name


def default_name(protocol: str, listen: str) -> str:
    """Return the name that a listener has by itself."""
    is_path = listen.startswith("unix:")
    return f"{protocol}-socket" if is_path else f"{protocol}-{listen.rpartition(':')[2]}"


def _name(entry: Entry) -> str:
    settings = entry.settings
    protocol, listen = str(settings.get("protocol", "sps")), str(settings["listen"])
    return str(settings.get("name") or default_name(protocol, listen))


def tell_of_guarded_targets(draft: Draft, notes: Notes) -> None:
    """Note what netproxyd refuses by itself, if there is a listener that others may reach."""
    hosts = [str(entry.settings["listen"]).rpartition(":")[0] for entry in draft.listeners]
    open_hosts = [host for host in hosts if not is_loopback(host) and not host.startswith("unix")]
    if open_hosts and "destinations" not in draft.sections:
        notes.changed(None, f"{GUARDED} and metadata services, {_DESTINATIONS}")
