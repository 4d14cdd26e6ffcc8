"""Exported models: equal to `render` in onnxruntime and after torch.export's saving."""

from __future__ import annotations

import sys

import pytest
import torch
import torch._inductor
from torch import nn

import liif_fast
from liif_fast.cli import main
from liif_fast.models import LIIF, MetaSR
from liif_fast.models.export import export, to_program
from liif_fast.utils.normalization import normalizations
from tests.helpers import range_error

ENCODER = {"name": "edsr-baseline", "args": {"no_upsampling": True, "n_resblocks": 1, "n_feats": 8}}
IMNET = {"name": "mlp", "args": {"out_dim": 3, "hidden_list": [16, 16]}}
# (input, result): enlarged, one latent, a side that stays, a side that shrinks.
SIZES = [((7, 9), (20, 31)), ((1, 1), (2, 1)), ((12, 5), (12, 40)), ((16, 17), (50, 13))]


def make(name):
    torch.manual_seed(0)
    if name == "MetaSR":
        return MetaSR(ENCODER)
    model = LIIF(ENCODER, IMNET, feat_unfold=name != "without unfolding")
    if name == "GELU":
        model.imnet = nn.Sequential(nn.Linear(76, 16), nn.GELU(), nn.Linear(16, 3))
    return model


def expected(model, image, size):
    inp, gt = normalizations(model.data_norm)
    with torch.no_grad():
        return gt.restore(model.encode(inp.normalize(image)).render(size))


def session(file):
    return pytest.importorskip("onnxruntime").InferenceSession(file)


def run(opened, image, size=None):
    feed = {"image": image.numpy()} | ({} if size is None else {"size": torch.tensor(size).numpy()})
    return torch.from_numpy(opened.run(None, feed)[0])


@pytest.mark.parametrize(
    "name", ["LIIF", *(pytest.param(name, marks=pytest.mark.prove) for name in ("without unfolding", "MetaSR"))]
)
def test_onnxruntime_renders_any_size(name, tmp_path):
    onnx = pytest.importorskip("onnx")
    model = make(name)
    file = liif_fast.export(model, tmp_path / "model.onnx")
    opened = session(file)
    for source, size in SIZES:
        image = torch.rand(2, 3, *source)
        assert range_error(run(opened, image, size), expected(model, image, size)) < 1e-4
    graph = onnx.load(file)
    onnx.checker.check_model(graph, full_check=True)
    assert graph.opset_import[0].version >= 17 and not any(node.op_type == "GridSample" for node in graph.graph.node)
    assert {node.domain for node in graph.graph.node} <= {
        "",
        "pkg.onnxscript.torch_lib.common",
        "pkg.torch.__subgraph__",
    }


@pytest.mark.prove
def test_float16_at_a_scale_on_the_command_line(tmp_path, capsys):
    opened_file = tmp_path / "model.onnx"
    pytest.importorskip("onnxscript")
    command = ["export", "tiny", "-o", str(opened_file), "--dtype", "float16", "--scale", "3.7x2.5"]
    assert main.main(command) == 0 and f"tiny -> {opened_file}" in capsys.readouterr().out
    model, opened = liif_fast.load("tiny"), session(opened_file)
    for source, _ in SIZES:
        image = torch.rand(2, 3, *source).half()
        size = tuple(max(1, round(side * scale)) for side, scale in zip(source, (2.5, 3.7)))
        found = run(opened, image)
        assert found.dtype == torch.float16 and found.shape[2:] == size  # 2.5 pixels become 2, 17.5 become 18
        assert range_error(found, expected(model, image.float(), size)) < 1e-2


@pytest.mark.prove
def test_aotinductor_compiles_a_program_of_a_fixed_size(tmp_path):
    """For images of any height and width. At -O0, since the compiler takes minutes for the default."""
    model = make("LIIF")
    program = to_program(model, size=(20, 31))
    options = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "model.pt2"), inductor_configs=options
    )
    compiled = torch._inductor.aoti_load_package(package)
    for source, _ in SIZES[2:]:
        image = torch.rand(2, 3, *source)
        assert range_error(compiled(image), expected(model, image, (20, 31))) < 1e-5


@pytest.mark.prove
@pytest.mark.parametrize("name", ["LIIF", "MetaSR", "GELU"])
def test_a_program_of_torch_export_is_the_same_after_saving(name, tmp_path):
    model = make(name)
    program = torch.export.load(export(model, tmp_path / "model.pt2")).module()
    same = torch.export.load(export(model, tmp_path / "same.pt2", scale=1)).module()
    for source, size in SIZES:
        image = torch.rand(2, 3, *source)
        assert range_error(program(image, torch.tensor(size)), expected(model, image, size)) < 1e-5
        assert range_error(same(image), expected(model, image, source)) < 1e-5


class DataDependent(nn.Module):
    def forward(self, x):
        return x[:, :3] if x.sum() > 0 else x[:, 1:4]


def custom(imnet):
    model = make("LIIF")
    model.imnet = imnet
    return model


@pytest.mark.parametrize(
    "model, path, options, error",
    [
        (None, "x.png", {}, "x.png has the unknown extension '.png': name it .onnx or .pt2"),
        (None, "x.pt2", {"scale": 2, "size": (3, 4)}, "scale and size are both given"),
        (None, "x.pt2", {"scale": 0.5}, r"scale is \(0.5, 0.5\), but a program takes numbers from 1 to 1000"),
        (None, "x.pt2", {"size": (0, 4)}, "size must be at least 1x1"),
        (None, "x.pt2", {"dtype": "int8"}, "dtype is 'int8', but must be one of float32, float16"),
        (nn.Linear(2, 2), "x.pt2", {}, "the model must be a LIIF or MetaSR, not Linear"),
        (custom(None), "x.pt2", {}, "this LIIF has no imnet"),
        pytest.param(
            *(custom(DataDependent()), "x.pt2", {}, "cannot be exported, probably because of its imnet DataDependent"),
            marks=pytest.mark.prove,
        ),
    ],
)
def test_bad_input_is_one_sentence(model, path, options, error, tmp_path):
    with pytest.raises((ValueError, TypeError), match=error):
        export(model, path if path == "x.png" else tmp_path / path, **options)


def test_the_command_line_names_what_is_wrong(tmp_path, capsys, monkeypatch):
    output = str(tmp_path / "x.onnx")
    assert main.main(["export", "tiny", "-o", output, "--size", "x20"]) == 1
    assert "--size needs both sides, such as 1920x1080" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main.main(["export", "tiny", "-o", output]) == 1
    assert "exporting to ONNX needs the packages onnx and onnxscript" in capsys.readouterr().err
