"""Loading: files and overrides become a checked `Config`, or one message that names every fault.

`load.load_config` is the way in. The answers to names of older systems (`renamed`, `older_systems`) and what is written
from the schema (`every_key`, `reference`) are here too.
"""
