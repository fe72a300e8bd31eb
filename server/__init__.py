"""The HTTP server and the command line: what a client and an operator see. It knows no torch."""

if __name__ != "pilotfish.server":  # found beside the package, from the repository
    raise ImportError("the package is called pilotfish.server, not server: import that")
