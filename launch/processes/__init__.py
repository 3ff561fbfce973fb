"""Processes: the ranks, as plain processes (`on_local`) or Ray actors (`on_ray`), and what each process needs: signals,
temporary folders, output, a connection to Ray, a number of ranks.

The supervisor, jobs, sweeps and commands import this package. It imports vimscale and `launch.hardware`.
"""
