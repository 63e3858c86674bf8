"""Our adapters in peft and transformers, and theirs here."""
