"""Token ids in, token ids out. One thread; no tensors, no text, no HTTP."""
