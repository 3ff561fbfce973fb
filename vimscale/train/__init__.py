"""Training: the loop, the run's state, recovery, evaluation and metrics. Only the launcher imports it."""
