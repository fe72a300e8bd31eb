"""Models on disk, read without torch: the catalogue of models, GGUF headers, JSON configurations."""

if __name__ != "pilotfish.checkpoints":  # found beside the package, from the repository
    raise ImportError("the package is called pilotfish.checkpoints, not checkpoints: import that")
