"""What a model is worth on a data set: the objective's figures, nearest neighbors, linear classifiers. Every image
counts once, whatever the number of ranks.

It imports objectives, data and what is below them. `vimscale.training` and the command line import it.
"""
