"""The checks of `pilotfish selftest`: does this machine compute what it should, and how fast? One module for each group
of checks, as `run.GROUPS` names them; `check` defines a check, `run` runs the groups.
"""
