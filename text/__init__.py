"""Text and tokens: tokenizer, token bytes, incremental detokenization. Imports neither the server nor torch."""

if __name__ != "pilotfish.text":  # found beside the package, from the repository
    raise ImportError("the package is called pilotfish.text, not text: import that")
