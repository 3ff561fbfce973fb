"""Sweeps and range tests: their trials, how trials are compared, and how they run without a user."""
