"""The checks of `inco-trio doctor`, which diagnose missing notifications from outside and change nothing.

`result` has the result of a check, and `processes` reads descriptors from /proc. `machine`, `links`, `registers` and
`proxies` have one function per check; `examination` calls them in order.
"""
