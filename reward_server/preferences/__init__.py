"""Preferences: comparisons on disk, who ranks them, and the sheets on which people do."""
