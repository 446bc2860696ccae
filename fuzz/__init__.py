"""The fuzzers: `python -m fuzz [NAMES…]`. Each takes bytes for what a stranger does, and raises if that does harm."""
