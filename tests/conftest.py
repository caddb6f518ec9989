"""Fixtures of all tests: see netns/README.md."""

pytest_plugins = ["netns.fixtures"]
