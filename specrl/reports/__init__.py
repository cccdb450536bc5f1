"""Figures, and the HTML page that `specrl report` writes."""
