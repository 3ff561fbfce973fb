"""What a recipe will need, take and cost: memory, traffic, time and money, before anything runs. For the launcher."""
