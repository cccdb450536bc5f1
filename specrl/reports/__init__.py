"""The HTML page that `specrl report` writes, and the figures of other commands."""
