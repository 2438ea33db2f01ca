"""A verdict: benchmarks as items, what a model is asked about each, and what its answers are worth.

Nothing here starts a process or writes a file. It imports of `actors` what samples, and never the buffer.
"""
