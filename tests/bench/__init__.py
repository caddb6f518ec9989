"""The benchmark: inco-trio compared with a C program and with the script that a Python user would write today."""
