"""Loading and extending models: the embedded tiny model, adapters, soft prompt, value head, generation."""

from common.open_files import accept_few_files

accept_few_files()
