"""whimbrel-qemu."""
