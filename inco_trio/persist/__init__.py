"""What outlives the process: the memory of what is in flight, and the descriptors that a supervisor keeps."""
