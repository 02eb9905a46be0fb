"""Motion: conditional normalizing flows that draw expression and head pose for speech (section 3.2 of the paper)."""
