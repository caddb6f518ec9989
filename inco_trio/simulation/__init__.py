"""Simulated cores: network namespaces, Unix sockets or a QEMU guest, and the demonstration that uses them."""
