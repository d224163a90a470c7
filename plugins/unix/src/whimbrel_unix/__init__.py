"""whimbrel-unix."""
