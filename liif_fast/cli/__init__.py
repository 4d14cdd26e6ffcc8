"""The command `liif-fast`: one module for each subcommand."""
