"""`pilotfish selftest`: whether this machine computes what it should, and how fast, by small checks of everything that
is special to a machine. One file for each group of checks; `run` runs them, `check` says what one is.

Imported by nothing but the command: an engine needs none of it.
"""
