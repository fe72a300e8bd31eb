"""The checks of `pilotfish selftest`: whether this machine computes correctly, and how fast. Each group of checks is a
module, named in `run.GROUPS`; `check` defines a check, `run` runs the groups.
"""
