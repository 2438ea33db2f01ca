"""A command line: the command `rayward` and its words.

May import: every room.
"""
