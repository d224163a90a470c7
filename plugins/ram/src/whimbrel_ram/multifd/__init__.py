"""multifd: pages over several channels beside the main one (QEMU, since 4.0)."""
