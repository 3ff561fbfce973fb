"""What shards are made of: folders, tables, Hugging Face sets, tars; their rows, labels and classes."""
