"""The page on which people rank, and its server: static files, an HTTP API over a project, limits and an audit log.

It may import reward_server.labeling; of the whole package it alone may import the web server, in app.py and guard.py.
"""
