"""Configurations of the original load unchanged; every mistake is one sentence with file and key."""

from pathlib import Path

import pytest
import yaml

from liif_fast.training import config
from liif_fast.training.config import ConfigError
from tests.training.runs import LIIF
from tests.training.training_data import CONFIGS, NAMES

PAIRS = CONFIGS / "train_edsr-baseline-x2.yaml"
TEST = {
    "test_dataset": {
        "dataset": {"name": "image-folder", "args": {"root_path": "load/HR"}},
        "wrapper": {"name": "sr-implicit-downsampled", "args": {"scale_min": 8}},
        "batch_size": 1,
    },
    "eval_type": "benchmark-8",
    "eval_bsize": 30000,
}


@pytest.mark.parametrize("name", NAMES)
def test_every_family_of_the_original_loads_unchanged(name):
    content = config.load(CONFIGS / name)
    assert content == yaml.safe_load((CONFIGS / name).read_text())
    assert content["optimizer"]["args"]["lr"] == 1e-4


def test_a_test_configuration_loads(tmp_path):
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(TEST))
    assert config.load(tmp_path / "test.yaml", "test") == TEST
    with pytest.raises(ConfigError, match="test_dataset is not a known key"):
        config.load(tmp_path / "test.yaml", "train")


@pytest.mark.parametrize("text", ["1.e-4", "1e-4", "1.0E-4", "+1e-04", "0.0001", ".1e-3"])
def test_all_usual_forms_of_a_number_are_read(text):
    content = config.load(LIIF, overrides=[f"optimizer.args.lr={text}"])
    assert content["optimizer"]["args"]["lr"] == pytest.approx(1e-4) and content["epoch_max"] == 2


def test_overrides_change_and_add_keys():
    changes = ["epoch_max=7", "multi_step_lr.milestones=[3, 5]", "autocast=bf16", "val_dataset=null"]
    content = config.load(LIIF, overrides=[*changes, "optimizer={name: sgd, args: {lr: 0.1, momentum: 0.9}}"])
    assert content["epoch_max"] == 7 and content["multi_step_lr"] == {"milestones": [3, 5], "gamma": 0.5}
    assert content["autocast"] == "bf16" and content["val_dataset"] is None
    assert content["optimizer"] == {"name": "sgd", "args": {"lr": 0.1, "momentum": 0.9}}


MISTAKES = [
    ("epoch_maximum=3", "epoch_maximum is not a known key; did you mean epoch_max?"),
    ("model=null", "model is missing"),
    ("train_dataset.wraper={}", "train_dataset.wraper is not a known key; did you mean wrapper?"),
    ("train_dataset.batch_size=null", "train_dataset.batch_size is missing"),
    ("train_dataset.batch_size=16.0", "train_dataset.batch_size is 16.0; it must be a whole number"),
    ("train_dataset.batch_size=0", "train_dataset.batch_size is 0; it must be at least 1"),
    ("epoch_max=ten", "epoch_max is 'ten'; it must be a whole number"),
    ("epoch_val=true", "epoch_val is True; it must be a whole number"),
    ("multi_step_lr.gamma=0", "multi_step_lr.gamma is 0; it must be above 0"),
    ("multi_step_lr.milestones=5", "multi_step_lr.milestones is 5; it must be a list"),
    ("multi_step_lr.milestones=[a]", "multi_step_lr.milestones.0 is 'a'; it must be a whole number"),
    ("data_norm.inp.sub=[]", "data_norm.inp.sub is []; it must be a list of at least one entry"),
    ("data_norm.gt=null", "data_norm.gt is missing"),
    ("model.name=lift", "model.name is 'lift', but no model is registered by that name; did you mean liif?"),
    ("model.args.cell_decod=true", "model.args.cell_decod is not an argument of it; did you mean cell_decode?"),
    ("model.args.cell_decode=maybe", "model.args.cell_decode is 'maybe'; it must be true or false"),
    ("model.args.encoder_spec=null", "model.args.encoder_spec is None"),
    ("model.args.encoder_spec.name=edsr-basline", "did you mean edsr-baseline?"),
    ("model.args.encoder_spec.args.n_feats=many", "encoder_spec.args.n_feats is 'many'; it must be a whole number"),
    ("model.args.imnet_spec.args.hidden_list=[a]", "imnet_spec.args.hidden_list.0 is 'a'; it must be a whole number"),
    ("model.args.imnet_spec.args={}", "model.args.imnet_spec.args.out_dim is missing"),
    ("optimizer.name=lion", "optimizer.name is 'lion', but no optimizer is registered by that name"),
    ("optimizer.args.learning_rate=1", "optimizer.args.learning_rate is not an argument of it"),
    ("optimizer.args=5", "optimizer.args is 5; it must be a dictionary"),
    ("train_dataset.dataset.args.root_path=./nowhere", "root_path is './nowhere'; it must be a folder that exists"),
    ("train_dataset.dataset.args.root_path=null", "train_dataset.dataset.args.root_path is None; it must be text"),
    ("train_dataset.dataset.args.split_file=no.json", "split_file is 'no.json'; it must be a file that exists"),
    ("train_dataset.dataset.args.repeat=a lot", "train_dataset.dataset.args.repeat is 'a lot'"),
    ("val_dataset.wrapper.args.sample_q=1.5", "val_dataset.wrapper.args.sample_q is 1.5; it must be a whole number or"),
    ("val_dataset.wrapper.args.inpsize=8", "val_dataset.wrapper.args.inpsize is not an argument of it"),
    (
        "train_dataset.loader=device",
        "train_dataset.loader is no longer a key, because worker processes make all items: delete",
    ),
    ("eval_type=div2k", "eval_type is 'div2k'; it must be div2k-N or benchmark-N"),
    ("autocast=bfloat", "autocast is 'bfloat'; it must be one of bf16, fp16"),
    ("channels_last=1", "channels_last is 1; it must be true or false"),
    ("clip_grad=-1", "clip_grad is -1; it must be above 0"),
    ("ema=1", "ema is 1; it must be below 1"),
    ("cosine_lr={}", "cosine_lr and multi_step_lr are both set; leave one of them out"),
    ("cosine_lr={warmup: 1.5}", "cosine_lr.warmup is 1.5; it must be a whole number"),
    ("max_minutes=0", "max_minutes is 0; it must be above 0"),
    ("accumulate=3", "accumulate is 3, which does not divide the batch_size 4"),
    ("resume=run/state.pth", "resume is 'run/state.pth'; it must be a file that exists"),
    ("imports=[no_such_module_at_all]", "imports names 'no_such_module_at_all', which cannot be imported"),
    ("imports=[no.py]", "no.py', which does not exist"),
]


@pytest.mark.parametrize(("override", "sentence"), MISTAKES, ids=[each for each, _ in MISTAKES])
def test_a_mistake_is_a_sentence_with_file_and_key(override, sentence):
    with pytest.raises(ConfigError) as raised:
        config.load(LIIF, overrides=[override])
    message = str(raised.value)
    assert message.startswith(str(LIIF)) and sentence in message and "\n" not in message


def test_a_pair_of_folders_needs_both():
    with pytest.raises(ConfigError, match=r"train_dataset\.dataset\.args\.root_path_2 is .* a folder that exists"):
        config.load(PAIRS, overrides=["train_dataset.dataset.args.root_path_2=./nowhere"])
    content = config.load(PAIRS)
    del content["train_dataset"]["dataset"]["args"]["root_path_2"]
    with pytest.raises(ConfigError, match=r"the configuration: train_dataset\.dataset\.args\.root_path_2 is missing"):
        config.check(content)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [1", "line 1 is not YAML"),
        ("epoch_max: 1\nepoch_max: 2\n", "line 2 is not YAML: epoch_max appears twice"),
        ("just text", "is no configuration: it must hold keys such as train_dataset"),
        ("", "is no configuration"),
        ("a: !!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, sentence):
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(ConfigError, match=sentence) as raised:
        config.load(tmp_path / "broken.yaml")
    assert "broken.yaml" in str(raised.value)


@pytest.mark.parametrize(("override", "word"), [("epoch_max", "key=value"), ("epoch_max.a=1", "holds no keys")])
def test_an_override_that_cannot_be_applied_is_named(override, word):
    with pytest.raises(ConfigError, match=rf"--set {override}.*{word}"):
        config.load(LIIF, overrides=[override])


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml does not exist"):
        config.load(Path("nowhere.yaml"))
