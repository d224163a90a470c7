"""whimbrel-fd."""
