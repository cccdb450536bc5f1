"""One module per command. Docstrings are help texts; a command raises a ValueError if an argument does not fit."""
