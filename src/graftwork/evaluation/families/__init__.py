"""The metrics of `graft eval`: one file a family, found by listing this package (see base.py)."""
