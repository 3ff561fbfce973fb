"""One rank as a process: plain or a Ray actor; its signals, temporary folders and output; the Ray it runs on."""
