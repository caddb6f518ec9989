"""Both cores of a board, for programs and tests that use a link or the registers without being the proxy."""
