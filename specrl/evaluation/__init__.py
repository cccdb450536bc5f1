"""Comparison of plan choosers, in simulation and live."""
