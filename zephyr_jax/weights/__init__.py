"""Weights: checkpoints (Orbax), Hugging Face folders, GGUF, PEFT adapters, the hub."""
