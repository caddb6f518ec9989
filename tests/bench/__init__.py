"""The benchmark: inco-trio beside a C program and beside the script that a Python user would write today."""
