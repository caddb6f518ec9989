"""Linux constants, structs and system calls that Python lacks. These modules import nothing else from inco_trio."""
