"""Files in and out: images, video, audio, motion."""
