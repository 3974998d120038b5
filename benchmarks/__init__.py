"""Performance claims as runnable comparisons: `python -m benchmarks [--quick]` runs the set (docs/performance.md)."""
