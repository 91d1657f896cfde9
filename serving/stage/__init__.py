"""A stage worker: one process that owns a run of layers and does what plans say."""
