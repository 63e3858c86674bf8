"""Weights and tokenizers in the formats that others read."""
