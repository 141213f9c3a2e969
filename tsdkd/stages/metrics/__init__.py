"""The metrics of training: their names, and the signs that a run degenerates. Imports no torch."""
