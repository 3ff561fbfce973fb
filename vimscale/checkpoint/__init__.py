"""Checkpoints: save while training, load at any number of ranks, mirror, retention, comparing two.

train, guard, export, estimate and launch may import it.
"""
