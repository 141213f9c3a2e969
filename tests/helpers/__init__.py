"""What several tests use; the only test code that other tests import."""
