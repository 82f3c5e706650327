"""Playing episodes and what they say: policies, protocols, and our environments against the official package."""
