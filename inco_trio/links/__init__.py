"""The links to core 1: one protocol, the kinds of links that follow it, and the address that names one."""
