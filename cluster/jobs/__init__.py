"""A Ray job: a command that runs on a cluster, and what travels with it.

May import: tracking, rundir, runtime, config.
"""
