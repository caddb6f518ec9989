"""The benchmark: compare inco-trio with a C program and with a script that a Python user would write today."""
