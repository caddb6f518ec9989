"""The fault suite: every fault that the proxy has to survive, on the real kernel, most under a real s6-svscan.

`INCO_TRIO_FAULTS=full` runs the storms for longer than the default, `short`.
"""
