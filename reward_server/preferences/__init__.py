"""Preferences: comparisons on disk, who ranks them, the sheets on which people do, files of labeling tools."""
