"""Values, protocols and statistics that every other folder shares. NumPy only."""
