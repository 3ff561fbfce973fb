"""Trained models in use: opened from a run, a checkpoint or an export, with what their images need.

It imports export, checkpoint, objectives, data and what is below them. The command line and `import vimscale` use it.
"""
