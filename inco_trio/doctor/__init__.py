"""What keeps notifications from coming: looked for from outside, without changing anything; see `inco-trio doctor`.

`result` is what a check returns, `processes` who has which descriptors; `machine`, `links`, `registers` and `proxies`
are the checks, one function each; `examination` puts them in order.
"""
