"""Read and write objects at addresses: s3, gs, az, hf, http(s), lakefs, memory, file.

    "s3://bucket/rows.jsonl" ─ address ─▶ Address ─ store ─▶ Store ─▶ bytes, ranges, a file to read, entries of a folder

- `address`: what an address is, its parts, and how it is shown without secrets.
- `store`: the protocol `Store`, and `open_store`, which chooses the library: obstore (s3, gs, az), fsspec (hf, memory,
  file) or requests (http, lakefs). Nobody outside this package knows which.
- `failures`: the errors, each one message.
- `finding`: the objects at an address: one, those of a folder, those of a glob.
- `versions`: branches of lakeFS and the Hub as commits.
- `local_copies`: objects and folders fetched once into a bounded cache on this machine.

This package needs neither torch nor the config. What an object means is for others to say.
"""
