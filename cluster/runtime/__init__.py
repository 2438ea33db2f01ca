"""A process: Ray's session, actors and their handles, threads and places, health, and what is left behind.

May import: config.
"""
