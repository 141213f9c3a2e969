"""Benchmarks by name, the paper's published numbers, and paired comparisons of results."""
