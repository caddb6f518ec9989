"""The registers: state files, trigger files and their directories, which the proxy watches with inotify."""
