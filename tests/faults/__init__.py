"""The fault suite: faults that the proxy must survive, on the real kernel and mostly under a real s6-svscan.

`INCO_TRIO_FAULTS=full` runs the storms for longer than the default, `short`.
"""
