"""Drafting, lossless acceptance and the batch session."""
