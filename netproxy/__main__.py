"""Runs netproxyd: `python3 -m netproxy` is the same as the netproxyd command."""

from netproxy.cli import main

raise SystemExit(main())
