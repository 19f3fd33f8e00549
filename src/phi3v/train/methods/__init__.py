"""What is trained: LoRA, QLoRA, PiSSA, frozen parts, the optimizers."""
