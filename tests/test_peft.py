"""PEFT folders: what is written and read, and what is refused."""
