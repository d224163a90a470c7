"""whimbrel-abstract."""
