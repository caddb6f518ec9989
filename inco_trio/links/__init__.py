"""The links to core 1, and what tells that they change."""
