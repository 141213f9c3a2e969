"""Code that several tests use; tests import test code from this package alone."""
