"""Checkpoints: saving beside the training, loading at any number of ranks, the mirror, comparing two."""
