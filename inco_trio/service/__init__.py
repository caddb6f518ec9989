"""What a supervisor sees: readiness, the log, the s6 scan directory and the systemd unit."""
