"""Asking a running proxy: the control socket, see docs/control.md."""
