"""Models as files: one module per format for writing, and readers for weights that a run starts from.

train, guard, estimate and launch may import it.
"""
