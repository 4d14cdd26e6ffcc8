"""What a benchmark needs on a user's machine: the original formulation, problems to run it on, and clocks."""
