"""Speech: decoding and the features that the flows listen to."""
