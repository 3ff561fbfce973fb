"""What a user looks at: the model as a table, plots, and the results of searches."""
