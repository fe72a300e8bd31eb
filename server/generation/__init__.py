"""The one flow by which every endpoint generates text: check, admit, tokenize, ask the engine, stream or collect.

`flow` is its course and `Endpoint` what an endpoint brings to it; `spec` is a request in the flow's terms; `answer` is
one answer while it comes in, `follow` how it comes, `usage` and `logprobs` what is reported of it; `events` are
server-sent events; `facts` is what is noted for logs and traces.
"""
