"""Performance claims as runnable comparisons."""
