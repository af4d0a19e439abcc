"""Sweeps: measure settings in separate processes and rank them."""
