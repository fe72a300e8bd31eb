"""Measuring and verifying speculation on any model, from token ids to rows of figures. No text, no files, no HTTP."""
