"""Tar shards: what a set is made of, its manifest, and how samples are read out of it."""
