"""Learned drafts and plans in the form in which they serve."""
