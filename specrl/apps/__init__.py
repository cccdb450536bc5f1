"""What `specrl <command>` runs: one module per command, each a function with typed keyword parameters."""
