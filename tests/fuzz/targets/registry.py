"""All targets by name."""

from __future__ import annotations

from tests.fuzz.targets import (
    config,
    control,
    direct,
    dns,
    first_bytes,
    framing,
    http,
    path,
    port_mapping,
    socks,
    stun,
)

TARGETS = {
    target.name: target
    for module in (
        socks,
        http,
        framing,
        path,
        direct,
        dns,
        config,
        control,
        first_bytes,
        stun,
        port_mapping,
    )
    for target in module.TARGETS
}
