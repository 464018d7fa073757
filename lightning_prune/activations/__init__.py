"""Activation functions: which there are, where a model calls them, and putting others in their place."""
