"""The timeout that all tests use."""

__all__ = ["HANG"]

HANG = 600
"""Time in seconds after which a wait fails its test. Only a hang reaches this limit, even on a slow machine.

The `timeout` of pytest in pyproject.toml is longer, so that the wait fails first and reports what it waited for.
"""
