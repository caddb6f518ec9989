"""Tests with the real proxy between two cores that are network namespaces. See README.md."""
