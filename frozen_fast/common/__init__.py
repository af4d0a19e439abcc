"""Shared by all packages: atomic file writes, logging, ranks and collectives. Import its modules by name."""
