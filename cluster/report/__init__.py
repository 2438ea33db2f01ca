"""A page: the report of a run directory, with its plots.

May import: tracking, rundir, runtime, config.
"""
