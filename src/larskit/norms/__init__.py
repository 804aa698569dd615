"""How lengths are found when a layer is sharded over processes or devices.

A norm takes the shards that are here and the layers they belong to, and returns the
lengths of the whole layers as a wide 1-d array.
"""
