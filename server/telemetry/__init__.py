"""Reports on a request once it has been answered: its line in the log, and its trace. Metrics are in
`server.metrics`, since they are counted while answers come in.
"""
