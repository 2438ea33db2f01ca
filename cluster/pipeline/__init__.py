"""A stage: one file for each step of InstructGPT, with what it reads, writes, checks and runs.

May import: fleet, report and below.
"""
