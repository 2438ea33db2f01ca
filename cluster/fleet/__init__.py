"""Workers kept alive: generators and reward replicas, replaced when they are lost, scaled while a run works.

May import: tracking and below.
"""
