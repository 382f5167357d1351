"""The schema: each file has the keys of one section, with types, defaults and descriptions.

`schema.Config` puts the sections together; `base.Section` is the base of each.
"""
