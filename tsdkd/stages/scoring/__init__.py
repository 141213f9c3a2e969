"""How scores are made: what both models see, what it costs, what it says."""
