"""From logits to tokens: penalties, filters, reproducible random numbers, log probabilities."""

from serving.sampling.rng import stream_key, uniforms
from serving.sampling.sampler import SampleOutput, Sampler

__all__ = ["SampleOutput", "Sampler", "stream_key", "uniforms"]
