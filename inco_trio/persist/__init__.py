"""State that outlives the process: the in-flight buffer, and the descriptors in an fd store."""
