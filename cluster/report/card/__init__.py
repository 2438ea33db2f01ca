"""A card: what somebody who does not know a run needs to judge it, in the run directory and beside its models.

May import: report's plots, rundir, config, the names of the suite's tasks.
"""
