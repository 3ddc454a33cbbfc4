"""Loading and extending models: the embedded tiny model, adapters, soft prompt, value head, generation."""
