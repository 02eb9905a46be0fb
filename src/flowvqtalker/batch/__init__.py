"""Many videos from a table of jobs: one pure function (``runner``), that workers call."""
