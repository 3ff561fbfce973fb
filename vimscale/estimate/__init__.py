"""Before anything runs: memory, traffic, time and money of a run on a cluster."""
