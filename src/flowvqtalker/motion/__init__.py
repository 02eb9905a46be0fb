"""Motion: conditional normalizing flows that sample expression and head pose for speech (section 3.2 of the paper)."""
