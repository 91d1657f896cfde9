"""API keys of students and teachers."""
