"""Tests of the real proxy between two cores, each of which is a network namespace. See README.md."""
