"""Prompts, and what answers them."""
