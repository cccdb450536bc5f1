"""The online and offline training loops, with their checkpoints and logs."""
