"""How models write messages: reasoning, content and tool calls, each format as data with a parser and a grammar.

transformers' response parsing (`response_schema`) reads whole answers only, and xgrammar's structural tags belong to
its own compiler; here parsers see tokens as they come, and llguidance masks. So the formats are written here, in tens
of lines each.
"""
