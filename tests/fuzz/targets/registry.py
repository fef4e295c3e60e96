"""All targets by name."""

from __future__ import annotations

from tests.fuzz.targets import config, control, dns, framing, http, socks

TARGETS = {
    target.name: target
    for module in (socks, http, framing, dns, config, control)
    for target in module.TARGETS
}
