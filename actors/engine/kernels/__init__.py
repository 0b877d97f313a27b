"""Attention over paged KV in Triton. Knows nothing of who owns a page, of scheduling or of models."""

BLOCK = 64
"""Keys that a program takes at a time. All lie in one page, so a page has a multiple of them."""
STEP = [
    *("rows", "width", "window", "table", "lens", "first", "chunk_row", "chunk_pages", "cu_q", "cu_k"),
    *("tile_row", "first_tile", "k_scale", "v_scale"),
]
"""Arguments that change with each step. Triton would compile a kernel for each combination of those that are 1, and of
numbers and addresses that are multiples of 16: seconds each, in the middle of a run."""
