"""The methods that a workload compares: the original formulation and every backend of the ops."""
