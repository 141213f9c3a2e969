"""share: an artifact -> a place elsewhere, and back.

stage.py holds `push` and `pull`. place.py reads, compares and writes a directory of any file system that fsspec knows;
hub.py commits to the hub. transfer.py copies parts in parallel, errors.py names the causes of failures.
"""
