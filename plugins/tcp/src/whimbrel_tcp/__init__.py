"""whimbrel-tcp."""
