"""The RLTuner (synth/tune.py): it learns which generator settings give data that a target model improves on most."""
