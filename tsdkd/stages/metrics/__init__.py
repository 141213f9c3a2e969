"""The metrics of training: their names and units, the log, and the signs that a run degenerates. Imports no torch."""
