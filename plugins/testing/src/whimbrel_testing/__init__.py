"""whimbrel-testing."""
