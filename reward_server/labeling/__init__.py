"""People's rankings: the page on which they are given, the log that keeps them, and what is made of it.

It may import its siblings in reward_server/ alone, and the web server only where a contract in pyproject.toml says so.
"""
