"""whimbrel-ssh."""
