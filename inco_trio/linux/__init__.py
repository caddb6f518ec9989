"""Constants, structs and system calls of Linux that Python lacks. Imports nothing else from inco_trio."""
