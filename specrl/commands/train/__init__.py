"""The commands that train a draft: online, offline, beside a running server, and on a Ray cluster."""
