"""What a step reads: clips, frame indices and augmentation, as pure functions of the seed and the position."""
