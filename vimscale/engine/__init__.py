"""All that knows DeepSpeed: the engine, the layout of ZeRO shards, the optimizer, recomputation."""
