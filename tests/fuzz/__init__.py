"""Fuzzers of everything that reads data of other programs. `nox -s fuzz -- --minutes N` runs them."""
