"""The links to core 1: the common protocol, the kinds of links, and their addresses."""
