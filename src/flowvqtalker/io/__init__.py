"""Files in and out: video, images, audio, coefficients, exports."""
