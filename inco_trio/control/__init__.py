"""The control socket, on which a running proxy answers requests: see docs/control.md."""
