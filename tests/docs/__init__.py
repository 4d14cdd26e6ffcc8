"""README and docs: every command and every Python block runs."""
