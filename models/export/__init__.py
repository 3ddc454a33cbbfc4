"""Leaving a trained model in other forms: fused, as a classifier, as GGUF, with a card, on the hub."""
