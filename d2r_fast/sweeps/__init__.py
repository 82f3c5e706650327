"""Many runs as one: the plan of them, their folder, each in a process of its own, all on Ray, and their table."""
