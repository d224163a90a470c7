"""Codecs of the migration stream, without I/O: values to bytes, and bytes (from any Reader) to values.

Format: the QEMU migration stream, version 3. `format` names the numbers, `items` has what stands between sections,
`return_path` what the destination answers.
"""
