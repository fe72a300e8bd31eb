"""Programs beside the engine: measuring, planning, checking a machine, training draft models."""

if __name__ != "pilotfish.tools":  # found beside the package, from the repository
    raise ImportError("the package is called pilotfish.tools, not tools: import that")
