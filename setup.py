"""Packaging metadata. The version is read from the source text, never imported."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).resolve().parent


def read_version() -> str:
    """Return `__version__` of netproxy/__init__.py."""
    text = (HERE / "netproxy" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r"^__version__\s*(?::\s*\w+\s*)?=\s*[\"']([^\"']+)[\"']", text, re.MULTILINE)
    if match is None:
        raise SystemExit("netproxy/__init__.py has no __version__")
    return match.group(1)


setup(
    name="netproxy",
    version=read_version(),
    description="SOCKS and HTTP proxy daemon, TCP and UDP on one port",
    license="MIT",
    packages=find_packages(include=["netproxy", "netproxy.*"]),
    package_data={"netproxy.admin.web": ["page.html"]},
    python_requires=">=3.10",
    install_requires=["pyyaml"],
    extras_require={"test": ["pytest", "pytest-xdist", "coverage"]},
    entry_points={
        "console_scripts": ["netproxyd=netproxy.cli:main", "netproxyctl=netproxy.cli:control_main"]
    },
)
