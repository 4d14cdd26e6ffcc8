"""What only a GPU shows, and the run of every check there: `python3 -m tests.gpu --out DIR` (see README.md here)."""
