"""Recorded loads: who came when, with how many tokens, and which prompts begin alike."""

from serving.traces.formats import read_trace
from serving.traces.recorded import Recorded, Trace

__all__ = ["Recorded", "Trace", "read_trace"]
