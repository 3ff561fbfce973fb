"""Keeping a run alive: the supervisor, its watchdog for hangs, its record of failures, and what it prints.

The commands and sweeps import this package. It imports `launch.processes` and vimscale.runtime.
"""
