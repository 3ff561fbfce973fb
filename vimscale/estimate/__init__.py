"""What a recipe will need, take and cost, before anything runs: memory, traffic, time, money. The launcher imports it."""
