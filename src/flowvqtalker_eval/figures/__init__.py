"""The paper's figures: every module makes a matplotlib figure from plain data, and holds the command for it."""
