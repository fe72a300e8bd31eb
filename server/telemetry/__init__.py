"""The log line and the trace of each request, made once it has been answered."""
