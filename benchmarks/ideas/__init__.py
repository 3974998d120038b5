"""What makes the scores better, or does not: one module a kind of idea, all run by benchmarks.accuracy_ideas."""
