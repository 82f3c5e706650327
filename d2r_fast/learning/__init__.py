"""One update: what it changes, how it is made, and the replay that it draws from."""
