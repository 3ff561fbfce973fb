"""What a person looks at: progress lines, the model as a table, plots."""
