"""Prompts, chat templates, batches, offline and online sources, and the teacher signal on disk."""
