"""A small case of every kernel, for compute-sanitizer: `python -m tests.gpu.small_cases`.

Everything is ten to a hundred times slower under the sanitizer, and tests/ops compares the results: here they must only
be free of NaN. Few of PyTorch's kernels run, because the sanitizer instruments those too.
"""

from __future__ import annotations

import itertools

import torch

from tests.gpu.problems import OPS, make_problem, run
from tests.gpu.sanitizer import FINISHED
from tests.helpers import Case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A remainder in every direction: rows that fill no tile, columns that fill no vector, two maps.
CASES = (
    Case(batch=2, channels=3, height=5, width=7, queries=37, hidden=(32, 16)),
    Case(channels=16, height=4, width=3, queries=70, hidden=(256, 256), local_ensemble=False, cell_decode=False),
    Case(channels=4, height=3, width=4, queries=70, hidden=(256,) * 4),
)


def main(backend: str, device: str) -> None:
    """Run every op with gradients and without, and at infinite coordinates."""
    for op, dtype, case in itertools.product(OPS, DTYPES, CASES):
        problem = make_problem(case, dtype, device, grad=True)
        results = run(op, problem, backend)
        with torch.no_grad():
            results += run(op, problem, backend)
            if any(tensor.isnan().any() for tensor in results):
                raise AssertionError(f"{op} gave NaN for {dtype}, {case}")
            problem.coord[0, :4, 0] = problem.coord.new_tensor([1e30, -1e30, float("inf"), -float("inf")])
            run(op, problem, backend)  # must read nothing outside the map


if __name__ == "__main__":
    main("cuda", "cuda:0")
    torch.cuda.synchronize()
    print(FINISHED, flush=True)
