"""Run as a service: readiness, log, process signals, and the files for s6 and systemd."""
