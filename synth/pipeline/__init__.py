"""The stages of Synthetic Data RL (synth/run.py), each a command of its own as well."""
