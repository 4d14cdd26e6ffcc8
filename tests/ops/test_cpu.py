"""Guarantees of the CPU kernels alone: threads, corners that count, saved activations, the processor's bfloat16."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
import torch

from liif_fast import ops
from liif_fast.ops.backends import extension
from tests.backends import ISAS, KINDS, TABLE
from tests.helpers import SHAPES, Case, needs_cpu, norm_error, psnr, random_problem
from tests.ops.decoding import decode, exact, gradients, latent_map_of, make_problem
from tests.ops.test_metasr import decode as decode_metasr
from tests.ops.test_metasr import problem as metasr_problem

pytestmark = needs_cpu
KIND = {kind.name: kind for kind in KINDS}
# Imnets with hidden products. The one with a layer of one channel is left out: its ReLU decides the whole gradient.
MULTIPLYING = [name for name, case in SHAPES.items() if case.queries and len(case.hidden) > 1 and min(case.hidden) > 1]


def train(problem, backend="cpu"):
    return gradients(decode(problem, backend), problem.leaves)


@pytest.fixture
def native_bfloat16():
    if not extension.OPS.cpu_has_bf16():
        pytest.skip("this processor has no AVX-512-BF16, or LIIF_FAST_CPU_ISA excludes it")


@pytest.mark.parametrize("kind", ["float32", "autocast-bfloat16"])
def test_results_do_not_depend_on_the_number_of_threads(kind):
    problem = make_problem(Case(3, 6, 9, 11, 701, (41, 24)), KIND[kind])
    metasr = [t.requires_grad_() for t in metasr_problem(torch.float32, queries=300)]
    results = []
    for threads in (1, 2, 5, 2):
        torch.set_num_threads(threads)
        try:
            out = decode_metasr(metasr, "cpu")
            results.append([*train(problem), out, *torch.autograd.grad(out.square().sum(), metasr)])
        finally:
            torch.set_num_threads(2)
    for other in results[1:]:
        assert all(norm_error(a, b) <= 1e-5 for a, b in zip(results[0], other, strict=True))
    # Runs with equally many threads repeat bit for bit, except for MetaSR's map, which PyTorch convolves.
    decodes = len(problem.leaves) + 1
    assert all(torch.equal(a, b) for a, b in zip(results[1][:decodes], results[3][:decodes], strict=True))


def test_grids_do_not_depend_on_threads_and_windows():
    """Bit for bit, although tiles hold other queries then."""
    case = Case(2, 3, 9, 11, hidden=(41, 24))
    feat, _, _, *layers = random_problem(case, torch.float32)
    size = (27, 33)
    whole = ops.render(feat, size, *layers, backend="cpu")
    for threads in (1, 5):
        torch.set_num_threads(threads)
        try:
            windows = [(top, left, 9, 11) for top in (0, 9, 18) for left in (0, 11, 22)]
            parts = [ops.render(feat, size, *layers, window=window, backend="cpu") for window in windows]
        finally:
            torch.set_num_threads(2)
        for (top, left, rows, cols), part in zip(windows, parts, strict=True):
            assert torch.equal(part, whole[..., top : top + rows, left : left + cols])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows_scale, cols_scale", [(1, 1), (3, 2), (5 / 3, 5), (2, 1.5)])
def test_corners_that_count(isa, rows_scale, cols_scale):
    """NaN in a latent reaches the pixels that it has a weight in without rounding; in training, all that read it."""
    latents = (6, 9)
    size = (round(latents[0] * rows_scale), round(latents[1] * cols_scale))
    layers = random_problem(Case(hidden=(16, 16), feat_unfold=False), torch.float32)[3:]
    arguments = {"feat_unfold": False, "backend": "cpu"}
    broken = torch.zeros(1, 3, *latents)
    broken[0, :, 2, 4] = float("nan")

    def reached(index: int, axis: int) -> list[bool]:
        """Of the pixels of an axis: whether latent `index` counts, by fractions."""
        scale, pixels = Fraction(size[axis], latents[axis]), range(size[axis])
        return [abs(Fraction(2 * pixel + 1, 2) / scale - index - Fraction(1, 2)) < 1 for pixel in pixels]

    expected = torch.tensor(reached(2, 0))[:, None] & torch.tensor(reached(4, 1))
    # On the last latent's center every weight is rounding: there every corner counts.
    read = ops.render(broken, size, *layers, **arguments | {"backend": "reference"})[0, 0].isnan()
    for axis, mask in enumerate((expected, expected.T)):
        for pixel in range(size[axis]):
            if (2 * pixel + 1) * latents[axis] == (2 * latents[axis] - 1) * size[axis]:
                mask[pixel] = (read, read.T)[axis][pixel]
    with TABLE[f"cpu-{isa}"].activate():
        assert torch.equal(ops.render(broken, size, *layers, **arguments)[0, 0].isnan(), expected)
        trained = ops.render(broken.requires_grad_(), size, *layers, **arguments)
        assert torch.equal(trained[0, 0].isnan(), read)
        double = [[t.double() for t in each] for each in layers]
        assert torch.equal(ops.render(broken.detach().double(), size, *double, **arguments)[0, 0].isnan(), read)


@pytest.fixture
def slab_limit():
    """Sets the most memory that saved activations take together."""
    before = extension.OPS.cpu_saved_layout([1], False, False)[3]
    yield extension.OPS.cpu_set_slab_limit
    extension.OPS.cpu_set_slab_limit(before)


def saved_tiles(slab):
    return slab[:8].view(torch.int64).item()


def test_slabs_are_used_again_up_to_their_limit(slab_limit):
    take = extension.OPS.cpu_take_slab
    gc.collect()  # graphs of other tests
    slab_limit(1 << 20)
    first, beyond = take(600_064, 1000), take(600_064, 1000)
    assert saved_tiles(first) == 600 and saved_tiles(beyond) == 0
    address = first.data_ptr()
    del first
    assert saved_tiles(take(1_000_064, 1000)) == 1000  # the free slab is too small and had to go
    address = (again := take(600_064, 1000)).data_ptr()
    view = again[64:]
    del again
    assert saved_tiles(take(600_064, 1000)) == 0  # a view still holds it
    del view
    assert (last := take(500_064, 1000)).data_ptr() == address and saved_tiles(last) == 500


@pytest.mark.parametrize("tiles", [0, 1, 30, 1000])
@pytest.mark.parametrize("kind", ["float64", "float32", "autocast-bfloat16"])
def test_saved_activations_change_no_bit(kind, tiles, slab_limit):
    problem = make_problem(Case(3, 6, 9, 11, 701, (41, 24, 57)), KIND[kind])
    expected = gradients(decode(problem, "cpu", recompute=True), problem.leaves)
    bf16 = kind == "autocast-bfloat16" and extension.OPS.cpu_has_bf16()
    slab_limit(64 + tiles * extension.OPS.cpu_saved_layout([41, 24, 57, 3], kind == "float64", bf16)[0])
    out = decode(problem, "cpu")
    torch.autograd.grad(out.sum(), problem.leaves, retain_graph=True)  # a second backward reads the same slab
    assert all(torch.equal(a, b) for a, b in zip(gradients(out, problem.leaves), expected, strict=True))


def test_saved_activations_of_other_kernels_are_computed_again():
    problem = make_problem(SHAPES["paper-width"], KIND["float32"])
    out = decode(problem, "cpu")
    with TABLE["cpu-portable"].activate():
        results = gradients(out, problem.leaves)
    assert all(norm_error(a, b) <= 1e-5 for a, b in zip(results, train(problem), strict=True))


def test_threads_save_activations_of_their_own(slab_limit):
    problems = [make_problem(Case(2, 6, 9, 11, 301, (41, 24)), KIND["float32"], seed=seed) for seed in range(8)]
    expected = [train(problem) for problem in problems]
    slab_limit(3 * 8 * 96 * 64 * 4)  # for some of the threads
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for results, wanted in zip(pool.map(train, problems), expected, strict=True):
                assert all(norm_error(a, b) <= 1e-5 for a, b in zip(results, wanted, strict=True))


@pytest.mark.prove
def test_training_steps_do_not_take_more_and_more_memory():
    problem = make_problem(Case(1, 3, 5, 7, 301, (64, 64)), KIND["float32"])

    def resident_pages() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1])

    for step in range(300):
        train(problem)
        if step == 20:
            before = resident_pages()
    assert resident_pages() - before < 500  # ten steps save 900 pages


@pytest.mark.parametrize("name", MULTIPLYING)
def test_no_worse_than_autocast_of_pytorch(name, native_bfloat16):
    """Squares of the relative errors of results and every gradient, added up over problems.

    In a small imnet one flipped ReLU decides which of two 16-bit results is better, so eight problems are added up.
    """
    sums = torch.zeros(2, 4 + 2 * (len(SHAPES[name].hidden) + 1), dtype=torch.float64)
    for seed in range(8):
        problem = make_problem(SHAPES[name], KIND["autocast-bfloat16"], seed=seed)
        expected = gradients(*exact(problem))
        for errors, backend in zip(sums, ("cpu", "reference"), strict=True):
            for position, (result, wanted) in enumerate(zip(train(problem, backend), expected, strict=True)):
                if wanted.norm() >= 1e-9:
                    errors[position] += norm_error(result, wanted) ** 2
    ours, plain = sums.sqrt()
    assert ours[0] <= plain[0]  # features, first and last layer are not rounded here
    assert (ours <= 2 * plain).all(), ours / plain


@pytest.mark.parametrize("isa", ISAS)
def test_only_a_processor_that_multiplies_bfloat16_rounds_operands(native_bfloat16, isa):
    problems = [make_problem(SHAPES["paper-width"], KIND[name]) for name in ("autocast-bfloat16", "float32")]
    with TABLE[f"cpu-{isa}"].activate():
        decodes = [decode(problem, "cpu", latent_map=latent_map_of(problem)) for problem in problems]
        results = [gradients(out, problem.leaves) for out, problem in zip(decodes, problems, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(*results, strict=True)]
    assert (
        not any(same[:-1]) if isa in ("avx512", "neon") else all(same)
    )  # the last bias's gradient is a sum of grad_out


def test_bfloat16_features_use_the_processors_own_products(native_bfloat16):
    problem = make_problem(SHAPES["paper-width"], KIND["bfloat16"], grad=False)
    native = decode(problem, "cpu")
    with TABLE["cpu-portable"].activate():
        widened = decode(problem, "cpu")
    assert not torch.equal(native, widened) and psnr(native, widened) >= 35
