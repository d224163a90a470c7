"""The loops of the ram section in C: what whimbrel_ram takes where it is installed. ImportError where it was built without a
compiler.
"""

from whimbrel_accel import _deltas as deltas, _packets as packets, _records as records

__all__ = ["deltas", "packets", "records"]
