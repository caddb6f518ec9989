"""Metrics for Prometheus, a dashboard of them and alert rules: see docs/metrics.md."""
