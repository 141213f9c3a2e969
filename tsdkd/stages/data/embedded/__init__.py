"""Prompts and a benchmark that come with the project, so that every command runs without a download."""
