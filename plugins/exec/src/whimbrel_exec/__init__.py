"""whimbrel-exec."""
