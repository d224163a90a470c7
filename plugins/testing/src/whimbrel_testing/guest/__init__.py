"""Programs that run inside a guest, as boot sectors built by Python: no assembler is needed."""
