"""A finding: whether a machine or a cluster is fit for a run, and what to do about it.

May import: tracking, rundir, runtime, config.
"""
