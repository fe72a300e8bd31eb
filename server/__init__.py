"""The HTTP server and the command line: everything that clients and operators see. It never imports torch."""

if __name__ != "pilotfish.server":  # found beside the package, from the repository
    raise ImportError("the package is called pilotfish.server, not server: import that")
