"""Trained models in other forms: fused, as a classifier, as GGUF, with a model card, on the hub."""
