"""Training: the loop, its evaluation, its metrics."""
