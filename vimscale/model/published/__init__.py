"""Published Vision Mambas: the arguments of their constructors, conversion of their weights, and what their code does
that ours does not.

It imports the rest of `vimscale.model`; `vimscale.model` itself does not import it, and any package above may.
"""
