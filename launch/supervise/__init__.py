"""Keeping ranks alive: the supervisor, its watchdog, what it remembers of failures, how many ranks there may be."""
