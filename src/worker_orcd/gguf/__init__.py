"""GGUF files: metadata and raw tensors, bounded and typed. No torch."""
