"""Prompt sets: raw prompts without repeats, a bounded number a user, split by user."""
