"""The engine's own scheduler against predicted step times and a virtual clock."""
