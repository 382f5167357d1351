"""The config of a run: its schema in `sections`, and how it is read in `loading`. Nothing here imports torch."""
