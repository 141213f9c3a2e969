"""Artifacts: the directories that one stage writes and the next one reads. Imports no torch.

An artifact holds `manifest.json` and the parts that it lists. Its *identity* is its configuration, seed, parents,
models and engine. A stage that runs again with the same identity resumes or does nothing; with another identity it
refuses. Its *fingerprint* covers identity and content; children record it. A manifest holds no time: the same work
writes the same bytes.

manifest.py defines a manifest, files.py names the files beside the parts, schemas.py holds the columns of the tables
and summaries.py the summaries. reader.py checks an artifact before a stage sees a row: json_files.py and rules.py check
what JSON files hold, tables.py what tables hold. writer.py writes an artifact atomically, journal.py records the
sessions that made it, and hashing.py computes the digests.
"""
