"""Configuration: of the engine (`engine`) and of a model folder (`model`)."""
