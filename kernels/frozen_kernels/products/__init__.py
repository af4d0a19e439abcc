"""Matrix products of bfloat16 activations on CPUs without bfloat16 units."""
