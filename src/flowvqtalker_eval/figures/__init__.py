"""The paper's figures. Each module draws one from plain data and holds its command."""
