"""Frames of clips, taken out once and kept as JPEG in tar shards with an index; import the modules by name.

Reading: layout, index, files, jpeg, decoder. Writing: extract, writer, tables, pack.
"""
