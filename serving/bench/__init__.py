"""Loads for the engine and the figures they give: `lectern bench`."""
