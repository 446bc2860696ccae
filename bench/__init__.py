"""The benchmarks: `python -m bench [NAMES…]`. What each number means is in docs/performance.md."""
