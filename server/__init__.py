"""Pilotfish's HTTP server: what a client sees. It knows no torch."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("pilotfish")
except PackageNotFoundError:  # run from a checkout that is not installed
    VERSION = "0+unknown"
