"""Tracking: the run folder on local disk is the source of truth, and a separate process uploads it to MLflow."""
