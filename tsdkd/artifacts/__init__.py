"""The directories between stages: manifest, schemas, checked reading, atomic writing, journal. Imports no torch."""
