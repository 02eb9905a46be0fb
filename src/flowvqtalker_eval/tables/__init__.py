"""Tables: which videos are compared, by which measures, and how results are written."""
