"""The engines that sample responses, and the check of an engine against transformers."""
