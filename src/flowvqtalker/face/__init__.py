"""Faces in images and clips: landmarks, the 3D morphable model, the crop."""
