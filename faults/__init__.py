"""The faults: what breaks beside a real vLLM, done on purpose, and what became of its requests."""
