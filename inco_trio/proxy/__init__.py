"""The proxy of one board, the fleet of several, and their tasks."""
