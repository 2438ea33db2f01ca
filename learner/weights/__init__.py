"""Weights that leave the learner: published to the actors, or saved to go on from."""
