"""Find and read the files that hold rows or text, for every command that takes some.

    path ─ find ─▶ DataFile, RowDataset ─ read ─▶ Row or RowFault, each with its place

- `find`: the table of formats; files, folders, globs, URLs.
- `datasets`: Hugging Face datasets, saved to disk or on the Hub.
- `read`: the rows in all of these, from `byte_blocks`, `json_values` and `tables`.
- `row_faults`: what is wrong with rows.

What a row means belongs to the room that asks for it: `data.chat`, `data.prepare`, `data.convert`.
"""
