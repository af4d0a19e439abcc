"""Pre-extracted frames: JPEG in tar shards with an index. Import the modules by name.

frozen_fast.data.packing writes shards.
"""
