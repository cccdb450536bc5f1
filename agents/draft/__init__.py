"""Draft learning: what the draft proposes."""
