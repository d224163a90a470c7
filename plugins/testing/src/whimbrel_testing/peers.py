"""Peers of interop tests as pytest fixtures."""
