"""The two sides of a board, as programs and tests use them."""
