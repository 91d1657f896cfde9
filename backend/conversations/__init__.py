"""Conversations: questions, answers in progress, and their events."""
