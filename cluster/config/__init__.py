"""A configuration: its schema, where its values come from, its presets, and the secrets that are kept out of it.

May import: nothing of cluster.
"""
