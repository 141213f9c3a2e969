"""share: an artifact -> a store, which is a directory elsewhere, and back.

stage.py holds `push` and `pull`. store.py lists, reads, compares and writes a directory of any file system that fsspec
knows; hub.py commits to the hub. transfer.py copies parts in parallel, errors.py names the causes of failures.
"""
