"""Metrics for Prometheus, with a dashboard and alert rules: see docs/metrics.md."""
