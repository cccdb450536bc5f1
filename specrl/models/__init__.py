"""Target, draft and their caches."""
