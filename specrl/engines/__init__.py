"""Engines: where rounds are decoded and timed."""
