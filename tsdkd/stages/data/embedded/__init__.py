"""Prompts and a benchmark that are part of the package, so that every command runs without a download."""
