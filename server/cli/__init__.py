"""The subcommands of `pilotfish` besides serve: flags and terminal output. What they run is in `tools.bench`.

The parser imports these modules at every start, `pilotfish serve` included, so they import torch, the tokenizer and
matplotlib only where a command runs.
"""
