"""Products with block-sparse matrices, and expert layers made of them."""
