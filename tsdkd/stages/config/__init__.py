"""The configuration of every stage. Imports no torch."""
