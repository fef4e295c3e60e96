"""Runs netproxy as Python does on OpenWrt with the package python3-light alone.

`python tests/support/light.py -m netproxy ...`: a module of another package cannot be imported.
"""

from __future__ import annotations

import os
import runpy
import sys

MISSING = frozenset(
    "_ctypes _curses _dbm _decimal _hashlib _lzma _multiprocessing _sqlite3 _ssl _uuid asyncio "
    "ctypes curses dbm decimal email logging lzma multiprocessing pydoc readline ssl unicodedata "
    "unittest urllib uuid xml yaml".split()
)
"""What OpenWrt has in packages of their own: python3-ctypes, python3-openssl and so on."""


def main() -> None:
    """Run the module that the arguments name."""
    for name in [name for name in sys.modules if name.partition(".")[0] in MISSING]:
        del sys.modules[name]
    for name in MISSING:
        sys.modules[name] = None  # type: ignore[assignment]  # an import of it fails
    sys.path[0] = os.getcwd()
    module, sys.argv = sys.argv[2], [sys.argv[2], *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__")


if __name__ == "__main__":
    main()
