"""The demonstration: a real model, a real vLLM and a Saltern server on this machine, step by step."""
