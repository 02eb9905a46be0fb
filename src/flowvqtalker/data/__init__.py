"""Data for training: clips and images on disk, shards, speech sets, splits."""
