"""Attention over paged KV in Triton. Knows nothing of who owns a page, of scheduling or of models."""
