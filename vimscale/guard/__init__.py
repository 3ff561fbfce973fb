"""The guard: judging steps, diagnosing bad ones, reporting them."""
