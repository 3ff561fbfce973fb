"""Everything that knows DeepSpeed: the engine, the layout of ZeRO shards, the optimizer, recomputation. `train`,
`guard` and `estimate` import it.
"""
