"""XBZRLE deltas in C: what whimbrel_ram.xbzrle takes where it is installed. ImportError where it was built without a compiler."""

from whimbrel_accel._deltas import REASONS, encode, patch

__all__ = ["REASONS", "encode", "patch"]
