"""A forecast: what a run needs in memory and time, and what would stop it, before it starts.

May import: pipeline and below.
"""
