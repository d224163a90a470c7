"""whimbrel-device."""
