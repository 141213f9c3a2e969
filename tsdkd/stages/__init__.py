"""The stages: each reads artifacts and writes one. They never print, never exit, and never import each other."""
