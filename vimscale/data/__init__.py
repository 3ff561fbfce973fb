"""From tar shards to batches on the device: data sets, the order of samples, the stream of batches, prefetching.

shards/ reads and writes tars, images/ decodes and augments. Imports recipe, model, storage and errors; prepare,
checkpoint, export, train, guard and launch import it.
"""
