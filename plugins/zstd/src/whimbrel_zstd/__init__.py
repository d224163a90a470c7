"""whimbrel-zstd."""
