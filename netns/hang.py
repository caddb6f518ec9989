"""The only deadline of the tests."""

__all__ = ["HANG"]

HANG = 600
"""Seconds after which a wait fails its test. It stops a hang and decides nothing: no machine, however slow, reaches it.

The `timeout` of pytest in pyproject.toml is longer, so that the wait fails first and says what it waited for.
"""
