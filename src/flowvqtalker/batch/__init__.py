"""Many videos from a table of jobs: one pure function (``runner``), driven by local processes."""
