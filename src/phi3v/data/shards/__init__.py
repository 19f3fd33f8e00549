"""Data as shards: tar files of records with their images, and an index that says what is where.

`write.py` makes them of JSONL, `existing.py` indexes what is there already. `index.py` is what both write, and what
`open_table` reads. `store.py` gives the images: of local files, or of remote ones, which `remote.py` fetches and
`cache.py` keeps.
"""
