"""Video towers."""
