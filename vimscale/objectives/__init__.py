"""What a model is trained for: a loss for a batch, and sums from which an evaluation's figures follow."""
