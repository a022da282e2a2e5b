"""GGUF metadata to ModelConfig, one file an architecture."""
