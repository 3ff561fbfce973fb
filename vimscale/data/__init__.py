"""Tar shards to batches: shards -> plan -> stream; decode and augment per image."""
