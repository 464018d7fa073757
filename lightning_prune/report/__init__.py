"""Measuring models and reporting what pruning changed."""
