"""Image generation: warping, the codebook, the generator, pasting back."""
