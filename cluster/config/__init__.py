"""A configuration: its schema, where its values come from, and its presets.

May import: nothing of cluster.
"""
