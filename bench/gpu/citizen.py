"""The ops as citizens of PyTorch on a device: streams, graphs, torch.compile, autocast, determinism, memory, models."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import liif_fast
from bench.gpu.chain import paper_case, run_query
from bench.gpu.check import Check, Context, Judge, Skip, require_gpu
from bench.gpu.limits import FORWARD, leaf_names
from bench.gpu.problems import Case, Decode, decode, norm_error, psnr, range_error
from liif_fast import ops

_SLEEP_CYCLES = 50_000_000  # some 30 ms: what did not wait for it reads values from before
_SPARE_BYTES = 64 << 20  # of workspaces, beside latent map and output


def checks() -> Iterator[Check]:
    yield Check("the table's own choice", default_choice)
    yield Check("empty queries", empty_queries)
    yield Check("training repeats bit for bit when asked to", deterministic)
    yield Check("another stream", another_stream)
    yield Check("CUDA graph of a decode", graph_forward)
    yield Check("CUDA graph of a training step", graph_training)
    yield Check("no synchronisation", no_synchronisation)
    yield Check("no allocation beside outputs and workspaces", allocations)
    yield Check("torch.compile(fullgraph)", compiled)
    yield Check("torch.compile(fullgraph) through inductor", compiled_by_inductor)
    yield Check("autocast", autocast)
    yield Check("the second device", second_device)
    yield Check("a model's step and image", model)
    yield Check("an upscaled photograph", upscaled)


def _problem(context: Context, dtype: torch.dtype = torch.float32, grad: bool = False) -> tuple[Case, Decode]:
    case = paper_case(context)._replace(queries=1000)
    if context.small:
        case = case._replace(queries=60, hidden=(64, 32))
    return case, decode(case, dtype, context.device, grad=grad)


def default_choice(context: Context, judge: Judge) -> None:
    """Without a named backend every imnet runs on the device, and right: what no kernel takes, layer by layer."""
    for case in (Case(hidden=(13, 37), outs=4), Case(hidden=(256, 256)), Case(hidden=(512,)), Case(hidden=())):
        for dtype in (torch.float64, torch.float32):
            problem = decode(case, dtype, context.device)
            layers = (problem.weights, problem.biases)
            with torch.no_grad():
                out, image = ops.query(*problem), ops.render(problem.feat, (20, 28), *layers)
                expected = ops.query(*problem.exact(), backend="reference")
                whole = ops.render(problem.feat, (20, 28), *layers, backend="reference")
            judge.at_most("query, error of the range", range_error(out, expected), FORWARD[torch.float32])
            judge.at_most("render, error of the range", range_error(image, whole), FORWARD[torch.float32])
            judge.true("on the device", out.device == context.device == image.device)


def empty_queries(context: Context, judge: Judge) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(queries=0, hidden=(32, 16), batch=2)
        problem = decode(case, dtype, context.device, grad=True)
        for fold in (False, True):
            out = run_query(problem, case, context.backend, fold=fold)
            judge.true("shape of query", out.shape == (2, 0, 3))
            grads = torch.autograd.grad(out.sum(), problem.leaves, allow_unused=True)
            zero = all(grad is None or not grad.any() for grad in grads)
            judge.true("zero gradients", zero)
        image = ops.render(
            problem.feat, (8, 9), problem.weights, problem.biases, window=(0, 0, 0, 9), backend=context.backend
        )
        judge.true("shape of render", image.shape == (2, 3, 0, 9))
        x, area_weight = ops.gather(problem.feat, problem.coord, problem.cell, backend=context.backend)
        judge.true("shape of gather", x.shape == (2, 0, 4, 31) and area_weight.shape == (2, 0, 4))
        judge.true("shape of ensemble", ops.ensemble(x, area_weight, backend=context.backend).shape == (2, 0, 31))


def deterministic(context: Context, judge: Judge) -> None:
    """Many queries on few latents, so that additions collide: with the switch on, two runs agree in every bit."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        case = Case(batch=2, channels=16, height=5, width=6, queries=500 if context.small else 30_000, hidden=(64, 64))
        problem = decode(case, dtype, context.device, grad=True)
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            for name, run in _trainings(problem, case, context.backend).items():
                first, second = run(), run()
                judge.true(f"{name} repeats", all(torch.equal(a, b) for a, b in zip(first, second, strict=True)))
        finally:
            torch.use_deterministic_algorithms(before)


def _trainings(problem: Decode, case: Case, backend: str) -> dict[str, Callable[[], list[Tensor]]]:
    """The differentiable ops, each as a function that returns its result and its gradients."""
    layers = (problem.weights, problem.biases)

    def finish(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
        return [out.detach(), *torch.autograd.grad(out.float().square().mean(), leaves)]

    def query() -> list[Tensor]:
        return finish(run_query(problem, case, backend), problem.leaves)

    def render() -> list[Tensor]:
        image = ops.render(problem.feat, (37, 41), *layers, backend=backend)
        return finish(image, [problem.feat, *layers[0], *layers[1]])

    def gather() -> list[Tensor]:
        x, area_weight = ops.gather(problem.feat, problem.coord, problem.cell, backend=backend)
        return finish(ops.ensemble(x, area_weight, backend=backend), problem.leaves[:3])

    return {"query": query, "render": render, "gather and ensemble": gather}


def another_stream(context: Context, judge: Judge) -> None:
    """On a stream that is kept busy first, inputs change late: kernels launched elsewhere would read the old ones."""
    require_gpu(context, "a stream")
    case, problem = _problem(context, torch.bfloat16, grad=True)
    for name, run in _trainings(problem, case, context.backend).items():
        expected = run()
        kept = problem.feat.detach().clone()
        with torch.no_grad():
            problem.feat.zero_()
        torch.cuda.synchronize(context.device)
        stream = torch.cuda.Stream(context.device)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(_SLEEP_CYCLES)
            with torch.no_grad():
                problem.feat.copy_(kept)
            found = run()
        stream.synchronize()
        judge.true(f"{name} is finite", all(bool(value.isfinite().all()) for value in found))
        worst = max(norm_error(a, b) for a, b in zip(found, expected, strict=True))
        judge.at_most(f"{name}, error", worst, 1e-2)  # atomic sums in 16 bits may differ between any two runs


def graph_forward(context: Context, judge: Judge) -> None:
    """Captured once, replayed on new inputs."""
    require_gpu(context, "a CUDA graph")
    for dtype in (torch.float32, torch.bfloat16):
        case, problem = _problem(context, dtype)
        other = decode(case, dtype, context.device, seed=9)

        def run(problem: Decode = problem, case: Case = case) -> list[Tensor]:
            layers = (problem.weights, problem.biases)
            x, area_weight = ops.gather(problem.feat, problem.coord, problem.cell, backend=context.backend)
            return [
                run_query(problem, case, context.backend, fold=True),
                ops.render(problem.feat, (100, 120), *layers, backend=context.backend),
                ops.ensemble(x, area_weight, backend=context.backend),
            ]

        with torch.no_grad():
            replayed = _capture(context, run, problem.leaves, other.leaves)
            expected = run(other)
        for out, true in zip(replayed, expected, strict=True):
            judge.at_most("error of the range", range_error(out, true), 1e-6)


def graph_training(context: Context, judge: Judge) -> None:
    require_gpu(context, "a CUDA graph")
    for dtype in (torch.float32, torch.bfloat16):
        case, problem = _problem(context, dtype, grad=True)
        other = decode(case, dtype, context.device, seed=9, grad=True)

        def run(problem: Decode = problem, case: Case = case) -> list[Tensor]:
            return [value for each in _trainings(problem, case, context.backend).values() for value in each()]

        replayed = _capture(context, run, problem.leaves, other.leaves)
        expected = run(other)
        for out, true in zip(replayed, expected, strict=True):
            judge.at_most("error", norm_error(out, true), 1e-5 if dtype == torch.float32 else 1e-2)


def _capture(
    context: Context, run: Callable[[], list[Tensor]], inputs: list[Tensor], new_values: list[Tensor]
) -> list[Tensor]:
    """Warm up, capture, write other values into the inputs, replay."""
    stream = torch.cuda.Stream(context.device)
    stream.wait_stream(torch.cuda.current_stream(context.device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream(context.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = run()
    with torch.no_grad():
        for old, new in zip(inputs, new_values, strict=True):
            old.copy_(new)
    graph.replay()
    torch.cuda.synchronize(context.device)
    return [out.clone() for out in outs]


def no_synchronisation(context: Context, judge: Judge) -> None:
    require_gpu(context, "the watch on synchronisation")
    case, problem = _problem(context, torch.bfloat16, grad=True)
    for name, run in _trainings(problem, case, context.backend).items():
        run()  # first calls compile and load
        torch.cuda.synchronize(context.device)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
            waited = ""
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            waited = str(error).splitlines()[0]
        finally:
            torch.cuda.set_sync_debug_mode(before)
        judge.true(f"{name} does not wait", not waited)
        if waited:
            judge.note(f"{name}: {waited}")


def allocations(context: Context, judge: Judge) -> None:
    """Peak memory of an inference decode: latent map, output and a workspace that does not grow with the image."""
    require_gpu(context, "the count of allocated bytes")
    side = 16 if context.small else 256
    for scale in (4, 8):
        for dtype in (torch.bfloat16, torch.float32):
            case = Case(channels=64, height=side, width=side, queries=1, hidden=(256,) * 4)
            problem = decode(case, dtype, context.device)
            layers = (problem.weights, problem.biases)
            out_side = side * scale
            with torch.no_grad():
                ops.render(problem.feat, (64, 64), *layers, backend=context.backend)
                torch.cuda.synchronize(context.device)
                torch.cuda.reset_peak_memory_stats(context.device)
                held = torch.cuda.memory_allocated(context.device)
                image = ops.render(problem.feat, (out_side, out_side), *layers, backend=context.backend)
                torch.cuda.synchronize(context.device)
            peak = torch.cuda.max_memory_allocated(context.device) - held
            # The convolution has its input's copy, its own workspace and a second latent map in another layout.
            latent_map = side * side * 256 * dtype.itemsize
            output = 3 * out_side * out_side * (4 + dtype.itemsize)
            judge.at_most(f"x{scale}, MB", peak / 1e6, (3 * latent_map + output + _SPARE_BYTES) / 1e6)
            del image


def compiled(context: Context, judge: Judge, compiler: str = "aot_eager") -> None:
    torch._dynamo.reset()
    case = Case(queries=40, hidden=(32, 16))
    problem = decode(case, torch.float32, context.device, grad=True)
    backend = context.backend

    def run(feat: Tensor, coord: Tensor, cell: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
        x, area_weight = ops.gather(feat, coord, cell, backend=backend)
        blended = ops.ensemble(x[..., :3], area_weight, backend=backend)
        decoded = ops.query(feat, coord, cell, weights, biases, backend=backend)
        image = ops.render(feat, (9, 11), weights, biases, backend=backend)
        return blended.sum() + decoded.square().sum() + image.square().sum()

    expected = run(*problem)
    found = torch.compile(run, fullgraph=True, backend=compiler)(*problem)
    judge.at_most("error", abs(float(found.detach() - expected.detach())) / abs(float(expected.detach())), 1e-5)
    for name, grad, true in zip(
        leaf_names(problem),
        torch.autograd.grad(found, problem.leaves),
        torch.autograd.grad(expected, problem.leaves),
        strict=True,
    ):
        judge.at_most(f"gradient of {name}", norm_error(grad, true), 1e-4)


def compiled_by_inductor(context: Context, judge: Judge) -> None:
    if context.small:
        raise Skip("inductor takes minutes on a CPU; aot_eager traces the same graph")
    compiled(context, judge, "inductor")


def autocast(context: Context, judge: Judge) -> None:
    """16-bit products, float32 results, exact coordinates: no latent chosen differently."""
    case = Case(channels=8, height=40, width=40, queries=3000, hidden=(32, 32))
    problem = decode(case, torch.float32, context.device, grad=True)
    exact = run_query(problem, case, context.backend)
    dtypes = (torch.bfloat16, torch.float16) if context.on_gpu else (torch.bfloat16,)
    for dtype in dtypes:
        with torch.autocast(context.device.type, dtype):
            trained = run_query(problem, case, context.backend)
            with torch.no_grad():
                inferred = run_query(problem, case, context.backend)
                image = ops.render(problem.feat, (50, 60), problem.weights, problem.biases, backend=context.backend)
            x, area_weight = ops.gather(problem.feat, problem.coord, problem.cell, backend=context.backend)
            blended = ops.ensemble(x[..., :2].to(dtype), area_weight, backend=context.backend)
        results = (trained, inferred, image, blended, area_weight)
        judge.true("float32 results", all(result.dtype == torch.float32 for result in results))
        judge.at_most("inference, error of the range", range_error(inferred, exact), 0.05)
        judge.true("inference multiplies in 16 bits", range_error(inferred, exact) > 0)
        judge.at_most("training, error of the range", range_error(trained, exact), 0.05)
        grads = torch.autograd.grad(trained.sum(), problem.leaves)
        judge.true("float32 gradients", all(grad.dtype == torch.float32 for grad in grads))


def second_device(context: Context, judge: Judge) -> None:
    """Everything on the device that is not the current one."""
    if not context.on_gpu or torch.cuda.device_count() < 2:
        raise Skip(f"there is one device of type {context.device.type}")
    case, first = _problem(context, torch.bfloat16, grad=True)
    second = first.to(torch.device("cuda", 1))
    runs = [_trainings(problem, case, context.backend) for problem in (first, second)]
    for name in runs[0]:
        expected, found = (each[name]() for each in runs)
        judge.true(f"{name} stays on its device", all(value.device.index == 1 for value in found))
        worst = max(norm_error(a.to(b.device), b) for a, b in zip(found, expected, strict=True))
        judge.at_most(f"{name}, error", worst, 1e-2)


def model(context: Context, judge: Judge) -> None:
    """LIIF and MetaSR: a training step's gradients and an image, against the same model on the reference."""
    specs = {
        "liif": {"imnet_spec": {"name": "mlp", "args": {"out_dim": 3, "hidden_list": [32, 32]}}},
        "metasr": {},
    }
    encoder = {"name": "edsr-baseline", "args": {"n_resblocks": 1, "n_feats": 16, "no_upsampling": True}}
    for name, args in specs.items():
        torch.manual_seed(0)
        net = liif_fast.make_model({"name": name, "args": {"encoder_spec": encoder, **args}}).to(context.device)
        generator = torch.Generator().manual_seed(2)
        inp = torch.rand(2, 3, 12, 13, generator=generator).to(context.device)
        coord = (torch.rand(2, 200, 2, generator=generator) * 2 - 1).to(context.device)
        cell = torch.full_like(coord, 0.05)
        results = []
        for backend in (context.backend, "reference"):
            net.backend = backend
            net.zero_grad()
            out = net(inp, coord, cell)
            out.square().mean().backward()
            with torch.no_grad():
                net.gen_feat(inp)
                image = net.render((30, 31))
            results.append([out.detach(), image, *(p.grad.clone() for p in net.parameters() if p.grad is not None)])
        judge.true(f"{name}: gradients of the same parameters", len(results[0]) == len(results[1]))
        # The encoder's convolutions may run in tf32; both sides do so alike.
        worst = max(norm_error(a, b) for a, b in zip(*results, strict=True))
        judge.at_most(f"{name}: worst error of outputs and gradients", worst, 1e-3)


def upscaled(context: Context, judge: Judge) -> None:
    """The shipped model on the device against the same on a CPU, in bands and in one piece."""
    generator = torch.Generator().manual_seed(4)
    small = torch.rand(1, 3, 12, 16, generator=generator)
    image = torch.nn.functional.interpolate(small, size=(40, 50), mode="bicubic").clamp(0, 1)[0]
    net = liif_fast.load()
    expected = liif_fast.upscale(image, scale=2.7, model=net, device="cpu", backend="reference")
    found = liif_fast.upscale(image, scale=2.7, model=net, device=context.device, backend=context.backend)
    judge.at_least("PSNR in dB", psnr(found.cpu(), expected), 50.0)  # the encoder may run in tf32
    half = liif_fast.upscale(
        image, scale=2.7, model=net, device=context.device, backend=context.backend, dtype=torch.bfloat16
    )
    judge.at_least("bfloat16, PSNR in dB", psnr(half.cpu(), expected), 35.0)
