"""Adapters on disk: our own folder, plain PEFT LoRA, and the released TextHarmony checkpoint."""
