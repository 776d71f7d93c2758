"""The record of a run: a folder with a journal on local disk is the truth, MLflow is fed from it by another process."""
