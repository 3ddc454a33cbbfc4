"""The teacher that needs no network: a server on loopback that answers by rule. `python -m synth.offline` starts it."""
