"""inco-trio: carries inter-core interrupts between the cores of an AMP board."""
