"""What a model is trained for. `base` says what may be asked of an objective, and each objective is one file. The
engine and whatever is above it ask; data, recipes and models know nothing of this package.
"""
