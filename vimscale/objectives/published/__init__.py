"""The public code of other objectives: its state dicts and arguments in, our modules out. docs/pretraining.md says what
the originals do that we leave out, and why.
"""
