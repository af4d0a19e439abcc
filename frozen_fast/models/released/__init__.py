"""Checkpoint files that other projects released."""
