"""Course documents: parse, pack into passages, index, retrieve, and build cited prompts."""
