"""A live state: what every process of a run takes and does, and who waits for whom.

May import: tracking, rundir, runtime, config.
"""
