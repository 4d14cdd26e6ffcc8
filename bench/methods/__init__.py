"""The methods that a workload compares: the original formulation, the folded baseline and every backend of the ops."""
