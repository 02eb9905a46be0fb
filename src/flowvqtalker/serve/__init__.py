"""HTTP server: a web page and an API. Jobs and files live in SQLite and a folder, and survive a kill."""
