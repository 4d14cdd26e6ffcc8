"""Upscaling in tiles: the result equals the one without tiles, and memory is bounded."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from liif_fast.images import tiles
from liif_fast.images.tiles import Window
from liif_fast.images.upscaling import output_size, upscale, upscale_rows
from tests.helpers import needs_cpu
from tests.images.upscaling import SMALL, WHOLE, encoder_spec, liif, metasr, nearest, photo, steps, untiled

MODELS = {
    "edsr": liif,
    "rcan": lambda: liif(encoder_spec("rcan")),
    "single-corner": lambda: liif(local_ensemble=False),
    "no-unfold": lambda: liif(feat_unfold=False),
    "no-cell": lambda: liif(cell_decode=False),
    "metasr": metasr,
    "nearest": nearest,
}


@pytest.mark.parametrize(
    ("name", "scale"),
    [*((name, 2.7) for name in MODELS), *(("edsr", scale) for scale in ((3, 2), 0.5, 1, (0.37, 5.3))),
     *((name, scale) for name in ("metasr", "nearest") for scale in ((3, 2), 0.5))],
)  # fmt: skip
def test_tiles_change_nothing(name, scale):
    model, images = MODELS[name](), photo(1, 67, 43)
    size = output_size((67, 43), scale=scale)
    expected = untiled(model, images, size)
    assert expected.std() > 0.05
    result = upscale(images, scale=scale, model=model, working_memory=SMALL)
    assert result.shape == (1, 3, *size)
    assert (result - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(("name", "size"), [("edsr", (1200, 4)), ("edsr", (4, 1200)), ("metasr", (1200, 4))])
def test_tiles_of_long_images(name, size):
    """Many tiles, and coordinates with the coarsest last bit."""
    model, images = MODELS[name](), photo(1, *size)
    whole = upscale(images, scale=3, model=model, working_memory=WHOLE)
    assert (upscale(images, scale=3, model=model, working_memory=SMALL) - whole).abs().max() <= 1e-5


def test_tiles_of_a_wide_receptive_field():
    model, images = liif(encoder_spec(n_resblocks=60, n_feats=4)), photo(1, 4, 300)
    assert model.encoder.halo > 100
    done = []
    result = upscale(images, scale=1, model=model, working_memory=SMALL, progress=lambda *pixels: done.append(pixels))
    assert len(done) > 1
    assert (result - untiled(model, images, (4, 300))).abs().max() <= 1e-5


def test_less_memory_means_more_steps():
    model, images = liif(), photo(1, 130, 100)
    counts = [steps(images, scale=1, model=model, working_memory=memory) for memory in (WHOLE, 2_000_000, SMALL)]
    assert counts[0] == 1 < counts[1] < counts[2]


@pytest.mark.parametrize("rows", [1, 20, 10**6])
@pytest.mark.parametrize(
    ("size", "latents", "halo", "area"),
    [
        ((100, 90), (50, 45), 5, 1),
        ((7, 2000), (7, 2000), 18, 3000),
        ((2000, 7), (4000, 14), 3, 500),
        ((3, 2), (300, 200), 4, 900),
        ((641, 479), (64, 48), None, 1),
        ((64, 48), (64, 48), 10, 64 * 48),
        ((900, 3000), (300, 1000), 20, 9000),
    ],
)
def test_bands_cover_the_output_once(size, latents, halo, area, rows):
    covered = np.zeros(size, int)
    bands = tiles.plan(size, latents, halo=halo, area=area, rows=rows)
    for band in bands:
        assert len({(window.top, window.height) for window in band}) == 1
        assert len(band) == 1 or band[0].height <= max(rows, -(-size[0] // latents[0]))
        for top, left, height, width in band:
            assert height > 0 and width > 0
            covered[top : top + height, left : left + width] += 1
    assert (covered == 1).all()
    assert [band[0].top for band in bands] == sorted(band[0].top for band in bands)
    if halo is None or latents[0] * latents[1] <= area:
        assert bands == [[Window(0, 0, *size)]]


def test_tiles_are_whole_rows_if_memory_allows():
    bands = tiles.plan((400, 400), (200, 200), halo=10, area=200 * 70, rows=1)
    assert bands == [[Window(top, 0, 100, 400)] for top in range(0, 400, 100)]
    wide = tiles.plan((400, 4000), (200, 2000), halo=10, area=200 * 70, rows=400)
    assert {len(band) > 1 for band in wide} == {True}


class Recorder:
    """A picture as Rows, that checks the order of the reads and remembers the most rows of one."""

    def __init__(self, samples, has_alpha):
        self._samples, self.has_alpha, self.dtype = samples, has_alpha, samples.dtype
        self.height, self.width, self.channels = samples.shape
        self._last, self.most = (0, 0), 0

    def read(self, top, bottom):
        assert self._last[0] <= top < bottom <= self.height and self._last[1] <= bottom
        self._last, self.most = (top, bottom), max(self.most, bottom - top)
        return self._samples[top:bottom]


@pytest.mark.parametrize(
    ("channels", "dtype", "width", "size", "ensemble"),
    [(3, np.uint8, 9, (220, 12), True), (4, np.uint16, 25, (180, 33), False), (2, np.uint8, 90, (120, 80), False),
     (1, np.float32, 9, (700, 40), False)],
)  # fmt: skip
def test_rows_are_read_and_written_in_order(channels, dtype, width, size, ensemble):
    samples = np.random.default_rng(0).random((190, width, channels)).astype(np.float32)
    samples[40:90, 4:8, -1] = 0
    samples = samples if dtype == np.float32 else (samples * np.iinfo(dtype).max).astype(dtype)
    source, model, written, done = Recorder(samples, channels in (2, 4)), liif(), [], []
    progress = lambda *pixels: done.append(pixels)  # noqa: E731
    options = {"model": model, "ensemble": ensemble, "working_memory": SMALL}
    upscale_rows(source, written.append, size, progress=progress, **options)
    assert source.most < 120 and max(map(len, written)) < size[0] / 3
    assert done == sorted(done) and done[-1] == (size[0] * size[1],) * 2
    result = np.concatenate(written)
    assert result.dtype == dtype
    np.testing.assert_array_equal(result, upscale(samples, size=size, **options))
    whole = upscale(samples, size=size, model=model, ensemble=ensemble, working_memory=WHOLE)
    visible = whole[..., -1:] > 0 if source.has_alpha else np.ones_like(whole, bool)
    error = np.abs(result.astype(float) - whole)[np.broadcast_to(visible, whole.shape)].max()
    assert error <= (1e-4 if dtype == np.float32 else 1 if dtype == np.uint8 else 8)


@pytest.mark.parametrize("make", [liif, metasr, nearest])
@pytest.mark.parametrize("working_memory", [SMALL, WHOLE])
def test_an_ensemble_is_the_average_of_turned_images(make, working_memory):
    model, images, size = make(), photo(2, 41, 34), (90, 57)
    model.data_norm["gt"] = {"sub": [0.5], "div": [model.data_norm["gt"]["div"][0] / 6]}  # nothing is clipped
    expected = 0
    for flips in ((), (2,), (3,), (2, 3)):
        expected += untiled(model, images.flip(flips), size).flip(flips) / 8
        turned = untiled(model, images.transpose(2, 3).flip(flips), size[::-1])
        expected += turned.flip(flips).transpose(2, 3) / 8
    done = []
    options = {"size": size, "model": model, "working_memory": working_memory}
    result = upscale(images, ensemble=True, progress=lambda *at: done.append(at), **options)
    assert (result - expected).abs().max() <= 1e-5
    assert (upscale(images, **options) - expected).abs().max() > 0.01
    assert len(done) >= 8 and done == sorted(done) and done[-1] == (2 * 90 * 57,) * 2


def test_a_batch_is_its_images():
    model, images = liif(), photo(2, 19, 23)
    both = upscale(images, scale=1.7, model=model, working_memory=100_000)
    for index in range(2):
        alone = upscale(images[index], scale=1.7, model=model)
        assert alone.shape == (3, 32, 39)
        assert (both[index] - alone).abs().max() <= 1e-6


@needs_cpu
@pytest.mark.parametrize(
    ("side", "scale", "working_memory", "limit", "counts_python"),
    [
        (384, 1, 32 << 20, 100e6, False),  # 211 MB without tiles
        (1024, 2, tiles.DEFAULT_MEMORY, 1.2e9, True),  # a megapixel enlarged by 2
    ],
)
@pytest.mark.prove
def test_memory_is_bounded(side, scale, working_memory, limit, counts_python):
    """The peak of a process with the shipped model, input and result, with or without Python and PyTorch."""
    script = textwrap.dedent(
        f"""
        import resource, numpy, torch
        from liif_fast import load, upscale

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

        torch.set_num_threads(2)
        model = load()
        image = numpy.random.default_rng(0).integers(0, 256, ({side}, {side}, 3), dtype=numpy.uint8)
        upscale(image[:16, :16], scale={scale}, model=model, backend="cpu")
        before = 0 if {counts_python} else peak()
        upscale(image, scale={scale}, model=model, backend="cpu", working_memory={working_memory})
        print(peak() - before)
        """
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < limit
