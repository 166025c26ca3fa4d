"""Distillation losses. `reference.py` is the definition of each."""
