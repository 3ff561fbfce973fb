"""What `vimscale data` does: make data sets of tar shards, index existing tars, merge, inspect and repair sets.

inputs/ reads what sets are made from, inspection/ looks at sets. Imports data, recipe, storage and errors; launch
imports it.
"""
