"""Runs netproxyd for `python3 -m netproxy`, and netproxyctl for `python3 -m netproxy ctl`."""

import sys

from netproxy.cli import control_main, main

raise SystemExit(control_main(sys.argv[2:]) if sys.argv[1:2] == ["ctl"] else main())
