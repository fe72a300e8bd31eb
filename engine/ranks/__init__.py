"""Tensor parallelism (arXiv 1909.08053): how a model is divided over ranks, and how they speak with each other."""
