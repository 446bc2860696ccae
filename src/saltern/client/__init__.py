"""The engine's side of the socket and of the arena; an operator's questions come through it as well."""
