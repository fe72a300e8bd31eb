"""The engine: tokens in, tokens out. It knows no HTTP."""

if __name__ != "pilotfish.engine":  # found beside the package, from the repository
    raise ImportError("the package is called pilotfish.engine, not engine: import that")
