"""Training: the loop, the run's state, recovery and metrics. Only the launcher imports it."""
