"""whimbrel-ram."""
