"""What shows a run's figures as it trains: TensorBoard's files, W&B, MLflow, Trackio."""
