"""Both cores of a board, for programs and tests that act as an application on core 0 or as core 1."""
