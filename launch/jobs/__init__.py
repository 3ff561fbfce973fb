"""Jobs: hand a run to a cluster and follow it. `backend` is the protocol; each on_*.py file is one kind of cluster.

The commands import this package. It imports cluster files, hardware and `processes`, never the commands.
"""
