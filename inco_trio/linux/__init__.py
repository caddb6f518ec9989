"""What the Linux kernel defines: constants, structs and system calls that Python lacks.

This package imports nothing else from inco_trio.
"""
