"""Making data sets of tar shards, looking at them, mending them: what `vimscale data` does."""
