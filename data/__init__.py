"""Generating, reading, validating and batching `.jsonl`. Needs neither mlx nor torch."""
