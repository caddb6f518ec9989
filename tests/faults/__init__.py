"""The fault suite: faults that the proxy must survive, on the real kernel and mostly under a real s6-svscan.

Set `INCO_TRIO_FAULTS=full` for longer storms and random walks (default: `short`).
"""
