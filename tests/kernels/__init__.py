"""Checks on distribution kernels in virtual machines; see `python -m tests.kernels --help`."""
