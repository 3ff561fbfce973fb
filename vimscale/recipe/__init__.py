"""What to train: the typed recipe, its sections, and the YAML that they are written in. Needs no torch.

It imports `vimscale.model` (the configuration), `vimscale.storage` and `vimscale.errors`. Any package above it may
import it.
"""
