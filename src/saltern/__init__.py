"""Saltern: an out-of-process, multi-tenant KV cache for LLM inference engines."""

__version__ = "0.1.0"
