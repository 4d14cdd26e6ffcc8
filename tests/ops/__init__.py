"""The ops: golden numbers of the original, the reference in float64, every backend."""
