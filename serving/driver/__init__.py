"""The driver: the one process that decides. It imports no torch."""
