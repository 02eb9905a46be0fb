"""Metrics of generated videos, one file each.

What a metric reads from a video (landmarks, embeddings, features) is made once by an extractor, see ``analysis``. The
columns of the tables are declared in :mod:`flowvqtalker_eval.tables.measures`.
"""
