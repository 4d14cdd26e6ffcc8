"""Small models and images for the tests of upscaling."""

import torch

from liif_fast.images.upscaling import upscale
from liif_fast.models import make_model

WHOLE = 1 << 40  # working memory in which the image is one tile
SMALL = 100_000  # working memory for small tiles, with several rows per decoding step


def encoder_spec(name="edsr-baseline", **args):
    own = {"rcan": {"n_resgroups": 1, "reduction": 4}}.get(name, {})
    return {"name": name, "args": {"n_resblocks": 2, "n_feats": 8, "no_upsampling": True, **own, **args}}


def liif(encoder=None, hidden=(16, 16), **flags):
    imnet_spec = {"name": "mlp", "args": {"out_dim": 3, "hidden_list": list(hidden)}}
    return make("liif", encoder_spec=encoder or encoder_spec(), imnet_spec=imnet_spec, **flags)


def metasr():
    return make("metasr", encoder_spec=encoder_spec())


def nearest():
    return make("liif", encoder_spec=encoder_spec(no_upsampling=False, scale=2))


def make(name, **args):
    """A model whose outputs spread over [0, 1], so that errors are visible; those of new weights are nearly equal."""
    torch.manual_seed(3)
    model = make_model({"name": name, "args": args}).eval()
    with torch.no_grad():
        model.gen_feat(2 * photo(1, 24, 24) - 1)
        deviation, mean = torch.std_mean(model.render((48, 48)))
    div = 0.2 / deviation.item()
    model.data_norm = {"inp": {"sub": [0.5], "div": [0.5]}, "gt": {"sub": [0.5 - mean.item() * div], "div": [div]}}
    return model


def photo(batch, height, width, seed=0):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def untiled(model, images, size):
    """The whole image at once, by the model's own methods."""
    sub, div, out_sub, out_div = (
        torch.tensor(model.data_norm[side][key]).view(-1, 1, 1) for side in ("inp", "gt") for key in ("sub", "div")
    )
    with torch.no_grad():
        model.gen_feat((images - sub) / div)
        return (model.render(size) * out_div + out_sub).clamp(0, 1)


def steps(image, **options):
    """The number of steps that upscale an image."""
    calls = []
    upscale(image, progress=lambda done, total: calls.append((done, total)), **options)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert calls[-1][0] == calls[-1][1]
    return len(calls)
