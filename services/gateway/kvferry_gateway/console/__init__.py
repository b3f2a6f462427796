"""The live console: a page, what it shows, and the one thing that it can do."""
