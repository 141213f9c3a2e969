"""Responses with the teacher's view of them: recorded, joined, measured on."""
