"""Synthetic data: a teacher model writes, votes on, adapts and selects what a base model is trained on."""
