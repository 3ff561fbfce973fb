"""Sweeps: trials, how they are compared, and where they run."""
