"""What `vimscale export --to` writes: one module or package for each format, with a class derived from `base.Format`."""
