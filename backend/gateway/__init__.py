"""The OpenAI-style door /v1 in front of the engine."""
