"""Losses of tokens and of preference pairs. They know arrays, not models."""
