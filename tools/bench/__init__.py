"""Measuring and checking speculation on any models: token ids in, rows of figures out. No text, no files, no HTTP."""
