"""A teacher behind an HTTP server: its log-probabilities are read by token ids, its weights are never loaded."""
