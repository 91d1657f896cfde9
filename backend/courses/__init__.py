"""Courses and who belongs to them."""
