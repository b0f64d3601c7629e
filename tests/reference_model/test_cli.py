"""The command line: presets and overrides, one-line errors, exit code 2, nothing half-written."""

import ast
import functools
import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from PIL import Image

from reference_model.cli import COMMANDS, main, parse
from reference_model.configs import (
    DROPPED,
    RENAMED,
    build,
    check_bounds,
    known_flags,
    preset_names,
    read_yaml,
    to_yaml,
)
from reference_model.data.config import DataConfig
from reference_model.files import InputError
from reference_model.model.config import ModelConfig
from reference_model.training.config import OptimConfig, TrainConfig


def refused(capsys, *arguments):
    """Run a command that must fail as a user's mistake, and give its one line."""
    assert main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("metris: error: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_fills_a_training_config(name):
    config = parse("train", ["--preset", name, "--data.root", "x"])
    assert config.data.root == Path("x")


def test_tiny_preset_curates_from_at_least_six_by_six_tokens():
    from reference_model.model.build import build_metris

    config = parse("train", ["--preset", "metris_tiny", "--data.root", "x"]).model
    stride = build_metris(config).image_encoder.strides[-1]
    assert config.image_size // stride >= 6


def test_overrides_win_over_files_and_files_over_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: {ratio: 0.4, num_heads: 4}\nbatch_size: 3\n")
    config = parse("train", ["--model.ratio", "0.5", f"--config={file}", "--data.root", "x"])
    assert (config.model.ratio, config.model.num_heads, config.batch_size) == (0.5, 4, 3)
    assert config.epochs == TrainConfig.epochs


def test_config_of_before_the_groups_fills_them(tmp_path):
    defaults = TrainConfig(data=None)
    flat = {old: value_of(defaults, new) for old, new in RENAMED.items()}
    changed = {"learning_rate": 0.5, "keep_best": 7, "contrastive_weight": 0.25, "accumulate": 3}
    old = {"data": {"root": "x"}, "steps": 9, **flat, **changed, "log_every": 4}
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(old))
    for config in (
        build(TrainConfig, read_yaml(tmp_path / "old.yaml", TrainConfig), source="old"),
        parse("train", ["--config", str(tmp_path / "old.yaml")]),
    ):
        for name, value in {**flat, **changed, "log_every": 4}.items():
            assert value_of(config, RENAMED[name]) == value, name
        assert config.steps == 9


def value_of(config, dotted):
    return functools.reduce(getattr, dotted.split("."), config)


@pytest.mark.parametrize("optim", ["{learning_rate: 0.2}", "3", "[1]"])
def test_old_option_beside_the_same_one_or_a_group_that_is_none_is_refused(optim, tmp_path):
    (tmp_path / "c.yaml").write_text(f"{{learning_rate: 0.1, optim: {optim}}}")
    with pytest.raises(InputError) as refused:
        read_yaml(tmp_path / "c.yaml", TrainConfig)
    assert "learning_rate and optim" in refused.value.problem and refused.value.step == "remove learning_rate"


def test_every_boolean_works_bare_and_hyphens_do():
    flags = known_flags(TrainConfig)
    assert {"cache", "parallel.compile", "model.coordinates", "dry_run"} <= flags
    for flag in flags:
        for words in ([f"--{flag}"], [f"--{flag}", "true"], [f"--{flag.replace('_', '-')}=true"]):
            assert value_of(parse("train", ["--data.root", "x", *words]), flag) is True
        assert value_of(parse("train", ["--data.root", "x", f"--{flag}", "false"]), flag) is False


def test_epochs_that_are_typed_stand_above_the_steps_of_a_preset():
    tiny = ["--preset", "metris_tiny", "--data.root", "x"]
    assert parse("train", tiny).steps == 800
    config = parse("train", [*tiny, "--epochs", "3"])
    assert (config.epochs, config.steps) == (3, None)
    both = parse("train", [*tiny, "--epochs", "3", "--steps", "5"])
    assert (both.epochs, both.steps) == (3, 5)


def test_bounds_hold_for_configs_made_in_python_too():
    check_bounds(TrainConfig(data=DataConfig(Path("x"))))
    for config, thing in (
        (TrainConfig(data=DataConfig(Path("x")), batch_size=0), "batch_size"),
        (TrainConfig(data=DataConfig(Path("x"), workers=-1)), "data.workers"),
        (TrainConfig(data=None, optim=OptimConfig(ema_decay=1.0)), "optim.ema_decay"),
        (TrainConfig(data=None, optim=OptimConfig(learning_rate=float("nan"))), "optim.learning_rate"),
    ):
        with pytest.raises(InputError) as refused:
            check_bounds(config)
        assert refused.value.thing == thing and "must be" in refused.value.problem and refused.value.step


def test_config_that_is_written_has_no_types_of_ours(tmp_path):
    config = parse("train", ["--data.root", "x", "--optim.clip_norm", "1.5", "--seed", "3"])
    assert yaml.safe_load(to_yaml(config))["optim"]["clip_norm"] == 1.5


def test_options_of_the_encoder_can_be_set_one_by_one():
    arguments = ["--data.root", "x", "--model.image_encoder_options.drop_path_rate", "0.1"]
    assert parse("train", arguments).model.image_encoder_options == {"drop_path_rate": 0.1}


def test_config_written_by_a_run_reads_back_the_same(tmp_path):
    config = parse("train", ["--preset", "metris_tiny", "--data.root", "x", "--model.image_weights", "w.pth"])
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert build(TrainConfig, read_yaml(tmp_path / "c.yaml", TrainConfig), source="c") == config


def test_dropped_options_load_at_the_value_that_is_left_and_are_refused_at_another(tmp_path):
    file = tmp_path / "c.yaml"
    old = {"steps": 5, "share_temperature": False, "model": {"ratio": 0.5, "straight_through": False}}
    file.write_text(yaml.safe_dump(old))
    parsed = parse("train", ["--config", str(file), "--data.root", "d", "--out", "o"])
    assert (parsed.steps, parsed.model.ratio) == (5, 0.5)
    for key in ("share_temperature", "model.straight_through"):
        *room, name = key.split(".")
        assert DROPPED[name] is False
        file.write_text(yaml.safe_dump({"model": {name: True}} if room else {name: True}))
        with pytest.raises(InputError) as caught:
            parse("train", ["--config", str(file), "--data.root", "d", "--out", "o"])
        assert caught.value.thing == f"{file}: {key}" and "set it to false" in caught.value.step
    # A trained model computes the same without it.
    assert read_yaml(file, ModelConfig, section="model") == {}


def test_paper_settings_are_the_defaults():
    config = TrainConfig(data=None)
    assert (config.epochs, config.batch_size, config.optim.learning_rate) == (40, 16, 3e-5)
    model = ModelConfig()
    assert (model.image_size, model.ratio, model.divide_by_count) == (480, 0.3, True)
    assert model.aggregation_temperature == 1.0 and model.image_encoder.startswith(
        "swin_base_patch4_window12"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option(name, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(name, ["--help"])
    assert caught.value.code == 0
    shown = "".join(capsys.readouterr().out.split())
    place, wanted = COMMANDS[name][0].split(":")
    module = importlib.import_module("reference_model." + place)
    names = {one.__name__ for one in getattr(module, wanted).__mro__}  # fields may be inherited
    classes = [n for n in ast.parse(inspect.getsource(module)).body if isinstance(n, ast.ClassDef)]
    statements, said = [n for c in classes if c.name in names for n in [*c.body, None]], {}
    for field, follows in pairwise(statements):
        if isinstance(field, ast.AnnAssign) and "Config" not in ast.unparse(field.annotation):
            assert isinstance(follows, ast.Expr), f"{field.target.id} has no docstring"
            words = "".join(follows.value.value.split())
            said[field.target.id] = words.replace("None:", "null:")  # as one types it
    assert all(docstring in shown for docstring in said.values())


def test_help_needs_no_torch():
    probe = (
        "import sys; from reference_model.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "print({'torch', 'transformers', 'timm'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "unknown command trian, expected one of generate, train, evaluate, predict"),
        (["data"], "data: needs a second word, data check or data show"),
        (["train", "--model.raito", "0.3"], "unknown key model.raito, did you mean model.ratio?"),
        (["train", "--preset", "metris_tinny"], "preset metris_tinny: unknown, did you mean metris_tiny?"),
        (["train", "--data.root", "x", "--model.ratio", "much"], "model.ratio"),
        (["train", "--data.root", "x", "--model.norm", "post"], "model.norm"),
        (["train"], "data.root"),
        (["train", "--data.root", "x", "--clip_norm", "1"], "did you mean optim.clip_norm?"),
        (["train", "--data.root", "x", "--contrastive_rows", "all"], "contrastive_rows, it is gone"),
        (["train", "--config"], "--config needs a value"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["train", "--data.root", "nowhere", "--preset", "metris_tiny"], "nowhere"),
        (["evaluate", "--checkpoint", "nowhere", "--data.root", "nowhere"], "nowhere"),
        (["predict", "--checkpoint", "nowhere", "--image", "a.png", "--expression", "star"], "nowhere"),
        (["generate", "--root", "new", "--size", "3"], "size must be a whole number in [32, 2048], got 3"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in refused(capsys, *arguments)
    assert os.listdir(tmp_path) == []


def test_unknown_key_in_a_file_names_file_key_and_nearest(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("model: {raito: 0.3}\n")
    line = refused(capsys, "train", "--config", file, "--data.root", "x")
    assert f"{file}: unknown key model.raito, did you mean model.ratio?" in line


def test_ratio_in_per_cent_is_refused_with_the_hint(scenes, tmp_path, capsys):
    arguments = (
        "--preset",
        "metris_tiny",
        "--data.root",
        scenes,
        "--out",
        tmp_path / "r",
        "--model.ratio",
        30,
    )
    assert "here 0.3" in refused(capsys, "train", *arguments)
    assert not (tmp_path / "r").exists()


def test_predict_from_the_command_line(run, scenes, tmp_path, capsys):
    image = next((scenes / "images" / "train2014").glob("*.jpg"))
    out = tmp_path / "mask.png"
    arguments = ["--checkpoint", run, "--image", image, "--expression", "the red star", "--out", out]
    assert main(["predict", *map(str, arguments)]) == 0
    assert "the red star" in capsys.readouterr().out and out.is_file()
    assert main(["predict", *map(str, arguments), "--expression", "left: [one", "--json"]) == 0
    assert (tmp_path / "mask_2.png").is_file()
    assert [entry["expression"] for entry in json.loads(capsys.readouterr().out)] == [
        "the red star",
        "left: [one",
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [("text.png", b"no image"), ("cut.png", None), ("empty.jpg", b"")],
)
def test_bad_images_are_refused_and_leave_nothing(run, scenes, tmp_path, capsys, name, content):
    whole = next((scenes / "images" / "train2014").glob("*.jpg")).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    out = tmp_path / "out" / "mask.png"
    line = refused(
        capsys,
        "predict",
        "--checkpoint",
        run,
        "--image",
        tmp_path / name,
        "--expression",
        "star",
        "--out",
        out,
    )
    assert name in line and not out.parent.exists()


def test_unwritable_output_is_refused(run, scenes, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    image = next((scenes / "images" / "train2014").glob("*.jpg"))
    out = tmp_path / "file" / "mask.png"
    line = refused(
        capsys, "predict", "--checkpoint", run, "--image", image, "--expression", "star", "--out", out
    )
    assert "cannot be written" in line and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "expression", ["red 😀", "a: b", "[x", "null", "1e5", "--json", '"', "{}", "the \u2028 star", "*a", "0x_"]
)
def test_any_sentence_is_taken_as_it_is(expression):
    config = parse("predict", ["--checkpoint", "c", "--image", "i.png", "--expression", expression])
    assert config.expression == [expression]


@pytest.mark.parametrize(
    ("yaml", "says"),
    [
        ("model: &a {image_encoder_options: *a}", "alias *a is not allowed"),
        ("steps: 2026-13-45", "is not YAML"),
        ("steps: [1", "is not YAML"),
        ("- 1", "holds a list"),
    ],
)
def test_hostile_yaml_is_refused_in_one_line(yaml, says, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(yaml)
    assert says in refused(capsys, "train", "--config", tmp_path / "c.yaml", "--data.root", "x")


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--model.num_heads", "0", "num_heads must be in [1, 1024], got 0"),
        ("--model.joint_dim", "0", "joint_dim must be in [1, "),
        ("--model.image_size", "10000000", "image_size must be in [32, 4096]"),
        ("--model.max_tokens", "2", "max_tokens must be in [3, 512], got 2"),
        ("--model.guidance_dim", "64", "guidance_dim is 64, but the text encoder gives 128"),
        ("--model.mlp_ratio", "-1", "mlp_ratio=-1 leaves no channel"),
        ("--model.text_encoder_options.hiden_size", "25", "BertConfig has no hiden_size"),
        ("--model.text_encoder_options.num_attention_heads", "0", "text_encoder_options: "),
        ("--model.image_encoder_options.output_stride", "7", "timm cannot build it"),
        ("--model.text_weights", "nowhere", "nowhere"),
        ("--model.image_weights", "nowhere.pth", "nowhere.pth"),
        ("--optim.clip_norm", "-1", "optim.clip_norm: must be > 0 and < inf, got -1"),
        ("--optim.poly_power", "nan", "optim.poly_power: must be >= 0 and < inf, got nan"),
        ("--seed", "4611686018427387904", "seed: must be >= 0 and < 2^31"),
        ("--data.workers", "-1", "data.workers: must be >= 0, got -1"),
    ],
)
def test_values_that_no_model_can_have_are_refused_before_anything_is_written(
    option, value, says, scenes, tmp_path, capsys
):
    usual = ("--preset", "metris_tiny", "--data.root", scenes, "--out", tmp_path / "run")
    assert says in refused(capsys, "train", *usual, option, value)
    assert not (tmp_path / "run").exists()


def test_damaged_image_is_one_line_from_a_worker_process_too(scenes, tmp_path, capsys):
    root = shutil.copytree(scenes, tmp_path / "data")
    for path in (root / "images" / "train2014").glob("*.jpg"):
        path.write_bytes(path.read_bytes()[:200])
    usual = ("--preset", "metris_tiny", "--data.root", root, "--out", tmp_path / "run")
    assert main(["train", *map(str, usual), "--data.workers", "1"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("metris: error: ") and ".jpg" in last and "Traceback" not in last


def test_library_without_extras_says_what_to_install():
    probe = (
        "import sys; sys.modules['jsonargparse'] = None\n"
        "from reference_model.__main__ import main; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "pip install 'metris-blocks[reference]'" in done.stderr


@pytest.mark.parametrize("out", [".", "..", "mask.jpg", "photo.png"])
def test_mask_is_never_written_where_it_does_not_belong(out, run, scenes, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.open(next((scenes / "images" / "train2014").glob("*.jpg"))).save("photo.png")
    before = Path("photo.png").read_bytes()
    arguments = ("--checkpoint", run, "--image", "photo.png", "--expression", "star", "--out", out)
    assert f"out {out}" in refused(capsys, "predict", *arguments)
    assert os.listdir() == ["photo.png"] and Path("photo.png").read_bytes() == before


def test_json_is_all_that_train_and_generate_print(tmp_path, capsys):
    root = tmp_path / "data"
    sizes = ("--size", 64, "--train", 4, "--val", 2, "--test", 1)
    assert main(["generate", "--root", str(root), *map(str, sizes), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pictures"] == 8
    arguments = (
        "--preset",
        "metris_tiny",
        "--data.root",
        root,
        "--out",
        tmp_path / "run",
        "--steps",
        1,
        "--json",
    )
    assert main(["train", *map(str, arguments)]) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["val"]["mIoU"] <= 1
