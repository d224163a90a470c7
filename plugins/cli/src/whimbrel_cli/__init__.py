"""migctl, the command line of whimbrel. Commands come from plugins; click and rich are imported at first use."""

__version__ = "0.1.0"
