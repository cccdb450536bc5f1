"""Rounds drawn from a recorded profile instead of a decoding model."""
