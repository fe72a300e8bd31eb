"""The flow shared by all endpoints that generate text: check, admit, tokenize, generate, stream or collect.

`flow` has the flow and the `Endpoint` interface; `spec` is a request in shared terms; `answer` is the state of one
answer, `follow` receives answers from the engine, `usage` and `logprobs` report on them; `events` writes server-sent
events; `facts` collects facts for logs and traces.
"""
