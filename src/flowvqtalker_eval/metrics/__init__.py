"""Measures of what is generated: one file per metric, and the tables and figures made of them."""
