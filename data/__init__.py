"""Making, reading, validating and batching `.jsonl`. Needs only numpy."""
