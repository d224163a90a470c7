"""whimbrel-cli."""
