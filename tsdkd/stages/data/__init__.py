"""Prompts, requests, batches, offline and online sources of training samples, and teacher signals on disk."""
