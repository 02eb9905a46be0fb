"""Clips and pictures on disk, the shards that training reads, and the splits."""
