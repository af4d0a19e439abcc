"""Divided attention: the entry point (api), one file per backend, and the choice between backends (selection)."""
