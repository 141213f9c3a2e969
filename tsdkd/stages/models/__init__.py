"""Models: paths, loading, sizes, memory, adapters, distribution, and the embedded pair."""
