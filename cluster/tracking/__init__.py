"""A record: metrics, phases and alerts, to JSON lines, the console, W&B, TensorBoard and Prometheus.

May import: rundir and below.
"""
