"""LLM and AsyncLLM for users of the library: the engine with the model's tokenizer, in this process or beside it."""
