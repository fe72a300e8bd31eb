"""The command line: the subcommands of `pilotfish`, their flags and their terminal output.

The parser imports these modules at every start, `pilotfish serve` included, so they import torch, the tokenizer and
matplotlib only where a command runs.
"""
