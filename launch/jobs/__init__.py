"""Jobs: one file for each kind of cluster behind one protocol."""
