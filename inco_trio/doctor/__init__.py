"""The checks of `inco-trio doctor`, which find the causes of missing notifications and change nothing.

`machine`, `links`, `register_files`, `proxies` and `services` contain the checks, one function per check.
`examination` calls them in order. `result` defines the result of a check.
"""
