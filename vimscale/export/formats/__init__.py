"""What `vimscale export --to` writes: a module or package for each format, with a subclass of `base.Format`."""
