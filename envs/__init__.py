"""Gymnasium environments over every engine, imported as `specrl.envs`."""

if __name__ != "specrl.envs":
    raise ImportError(f"this folder is imported as 'specrl.envs', but got {__name__!r}; write 'import specrl.envs'")
