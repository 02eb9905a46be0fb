"""The paper's evaluation: metrics, tables, figures and the user study (extra ``eval``)."""
