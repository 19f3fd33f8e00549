"""Conversations and their images: the JSONL schema, lazy reading, checking and converting.

Start at `schema.py` (what a line holds), then `table.py` (reading), `check.py` (faults), `sources/`
(one converter a dataset).
"""
