"""The engine's HTTP door: an OpenAI-style API over `serving.engine.Engine`."""
