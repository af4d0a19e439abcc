"""Sampling of clips, frames and augmentation, as pure functions of the seed and the position."""
