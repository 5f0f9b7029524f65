"""Held-out text: perplexity over length, needles, attention, their report, and the same while a run trains."""
