"""The cache as a pure function of events: no I/O, clock, thread or randomness below this package."""
