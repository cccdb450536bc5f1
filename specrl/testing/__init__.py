"""Conformance checks for engines and agents of your own."""
