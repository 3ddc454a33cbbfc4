"""Instruction evolution (synth/evolve.py): chains of rewritings, the policy that chooses them, and their judge."""
