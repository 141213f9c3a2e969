"""Benchmarks through lm-eval: the table, who answers, confined programs, comparison."""
