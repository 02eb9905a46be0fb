"""Speech features and the speech encoder."""
