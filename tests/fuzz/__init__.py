"""Fuzz targets for all code that reads data from other programs. `nox -s fuzz -- --minutes N` runs them."""
