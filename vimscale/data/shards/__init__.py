"""Tar shards: members of a tar, the manifest of a set, the reader of a shard, and the node's cache of remote shards.

Imports recipe, storage and errors; data and prepare import it.
"""
