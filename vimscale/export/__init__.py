"""Trained models as files for others to use, one module a format."""
