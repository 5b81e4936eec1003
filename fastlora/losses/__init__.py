"""Objectives: a loss and its metrics from log-probabilities and a TrainBatch."""
