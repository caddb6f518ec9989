"""The registers: state files, triggers, their directories, and the inotify descriptor that reports on them."""
