"""Tests of the benchmarks that are not shipped: workloads, methods, results and documents."""
