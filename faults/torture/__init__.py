"""The torture: servers killed under load, again and again on the same files, and what became of their blocks."""
