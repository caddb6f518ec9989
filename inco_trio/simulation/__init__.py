"""Two cores as network namespaces, and the demonstration on them."""
