"""A run directory: its files and models, what each was made of, and which stages are complete.

May import: runtime, config.
"""
