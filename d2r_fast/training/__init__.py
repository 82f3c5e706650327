"""A run in a directory: collecting, the loop of chunks and updates, checkpoints, metrics, progress."""
