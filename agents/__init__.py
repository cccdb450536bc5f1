"""Plan choosers and draft learners, imported as `specrl.agents`."""

if __name__ != "specrl.agents":
    raise ImportError(f"this folder is imported as 'specrl.agents', but got {__name__!r}; write 'import specrl.agents'")
