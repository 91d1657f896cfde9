"""Live figures of engine and platform for administrators."""
