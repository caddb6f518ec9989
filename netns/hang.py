"""The only deadline of the tests."""

__all__ = ["HANG"]

HANG = 600
"""Seconds after which a wait fails its test. This only stops a hang: even a slow machine needs much less time.

The `timeout` of pytest in pyproject.toml is longer, so that the wait fails first and reports what it waited for.
"""
