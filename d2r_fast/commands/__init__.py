"""`d2r`'s commands, one file each: `run(args)` does it and returns the exit status."""
