"""Text to token ids: tokenizers and the chat template."""
