"""What a terminal shows: help with examples, completion, versions, kernels, tables of many images."""

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
import typing
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import metris_blocks
from metris_blocks.ops import auto_backend, explain_backends, masked_attention
from reference_model.cli import COMMANDS, EXAMPLES, load, main, parse
from reference_model.data.config import DataConfig
from reference_model.data.datasets import read
from reference_model.data.images import open_image
from reference_model.files import InputError
from reference_model.info import backends
from reference_model.viewing.config import PredictConfig
from reference_model.viewing.jobs import jobs
from reference_model.viewing.runs import spaced_images


def options(config, prefix=""):
    """Dotted names of all fields with their types, and the optional groups, whose fields stand apart."""
    types = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        kinds = (types[field.name], *typing.get_args(types[field.name]))
        nested = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
        if nested is None or nested is not kinds[0]:
            yield f"{prefix}{field.name}", kinds
        if nested is not None:
            yield from options(nested, f"{prefix}{field.name}.")


def helped(name, capsys, *arguments):
    """What a help says of each option, and the whole."""
    with pytest.raises(SystemExit):
        parse(name, list(arguments))
    shown = capsys.readouterr().out
    parts = re.split(r"\n  (?=--)", shown.split("examples:")[0])
    return {part.split()[0].rstrip(","): " ".join(part.split()) for part in parts[1:]}, shown


UNIT_OR_RANGE = re.compile(
    r"\b(pixels|MiB|steps?|epochs|sentences|images|pictures|tokens|ids|channels|layers|heads|samples|shapes|rows"
    r"|entries|processes|pieces|states|evaluations|passes|rounds|at least|or more)\b|> 0|in [\[(]",
    re.IGNORECASE,
)
PURE_NUMBERS = {"learning_rate", "image_encoder_lr", "text_encoder_lr", "poly_power", "weight_decay", "seed"}
PURE_NUMBERS |= {"clip_norm", "contrastive_weight", "no_target_weight"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_words_a_unit_and_a_default_and_the_command_an_example(name, capsys):
    said, shown = helped(name, capsys, "--help")
    for option, kinds in options(load(COMMANDS[name][0])):
        group = f"--{option.split('.')[0]}"
        if f"--{option}" not in said and f"{group}.help" in said:  # of an optional group
            said |= helped(name, capsys, f"{group}.help")[0]
        text = said.get(f"--{option}", "")
        assert "(required" in text or "default: " in text, f"{name} --{option} tells no default: {text!r}"
        words = text.split("(type")[0].split("(required")[0].split()
        assert len(words) >= 3, f"{name} --{option} is not explained: {text!r}"
        if {int, float} & {*kinds} and option.split(".")[-1] not in PURE_NUMBERS:
            assert UNIT_OR_RANGE.search(text.split("(type")[0]), f"{name} --{option} tells no unit: {text!r}"
    lines = [line.strip() for line in shown.split("examples:")[1].splitlines() if line.strip()]
    assert lines == [f"metris {name} {example}".strip() for example in EXAMPLES[name]]
    assert "<class" not in shown and " None: " not in " ".join(shown.split())


@pytest.mark.parametrize(
    ("name", "example"), [(name, e) for name, examples in EXAMPLES.items() for e in examples]
)
def test_every_example_is_a_command(name, example):
    assert parse(name, shlex.split(example.split(" > ")[0]))


def test_every_command_has_an_example():
    assert set(EXAMPLES) == set(COMMANDS) and all(EXAMPLES.values())


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"app"}))
def test_every_command_that_prints_results_prints_json_too(name):
    assert "json" in {field.name for field in dataclasses.fields(load(COMMANDS[name][0]))}


def test_version_is_the_librarys(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"metris {metris_blocks.__version__}\n"


def test_info_tells_what_the_ops_tell(capsys):
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"] == torch.__version__.split("+")[0]
    rows = {row["backend"]: row for row in found["backends"] if row["op"] == "masked_attention"}
    query, key = torch.zeros(1, 21, 8, 96), torch.zeros(1, 225, 8, 96)
    reasons = explain_backends(query, key, key, torch.ones(1, 21, 225, dtype=torch.bool))
    assert {name: row["why_not"] for name, row in rows.items()} == reasons
    assert [name for name, row in rows.items() if row["auto"]] == ["sdpa"]
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for name, why in reasons.items():
        line = next(line for line in out.splitlines() if line.split()[:4:3] == ["masked_attention", name])
        assert ("yes" in line) == (not why) and all(reason in line for reason in why)


def test_info_names_each_gpu_with_what_torch_says_of_it(monkeypatch, capsys):
    class Card(NamedTuple):
        name: str
        major: int
        minor: int
        total_memory: int

    cards = [Card("NVIDIA H100", 9, 0, 80 * 2**30), Card("Tesla T4", 7, 5, 15 * 2**30 + 2**29 + 1)]
    asked = []

    def rows(device, dtype):
        asked.append((device, dtype))
        row = {"op": "masked_attention", "backend": "xformers", "auto": True, "why_not": []}
        return [row | {"device": device, "dtype": str(dtype)}]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_properties", cards.__getitem__)
    monkeypatch.setattr("reference_model.info.backends", rows)
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["devices"] == [
        f"cpu, {torch.get_num_threads()} threads",
        "cuda:0, NVIDIA H100, compute capability 9.0, 80 GiB",
        "cuda:1, Tesla T4, compute capability 7.5, 16 GiB",
    ]
    assert asked == [("cpu", torch.float32), ("cuda", torch.float32), ("cuda", torch.bfloat16)]
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "cuda:1, Tesla T4" in out and "torch sees none" not in out
    assert re.search(r"masked_attention +cuda +torch.bfloat16 +xformers +yes, auto", out)


@pytest.mark.cuda
def test_info_of_a_gpu_tells_what_runs_on_it():
    query, key = (torch.randn(1, n, 8, 96, device="cuda", dtype=torch.bfloat16) for n in (21, 225))
    mask = torch.ones(1, 21, 225, dtype=torch.bool, device="cuda")
    rows = [row for row in backends("cuda", torch.bfloat16) if row["op"] == "masked_attention"]
    assert {row["backend"]: row["why_not"] for row in rows} == explain_backends(query, key, key, mask)
    assert [row["backend"] for row in rows if row["auto"]] == [auto_backend(query, key, key, mask)]
    whole = masked_attention(query, key, key, mask, backend="eager")
    for row in rows:
        if row["why_not"]:
            with pytest.raises(NotImplementedError, match="cannot run"):
                masked_attention(query, key, key, mask, backend=row["backend"])
        else:
            found = masked_attention(query, key, key, mask, backend=row["backend"])
            torch.testing.assert_close(found, whole, atol=2e-2, rtol=2e-2)


# ----------------------------------------------------------------------------------------------- completion


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("shell") / "metris"
    command = [sys.executable, "-m", "reference_model", "--print_completion=shtab-bash"]
    with path.open("w") as file:
        subprocess.run(command, stdout=file, check=True)
    return path


def complete(script, line):
    words = line.split(" ")
    commands = f"""
        source {script}
        COMP_WORDS=({" ".join(map(shlex.quote, words))}); COMP_CWORD={len(words) - 1}
        _shtab_metris 2>/dev/null; printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    out = subprocess.run(["bash", "-c", commands], capture_output=True, text=True, check=True).stdout
    return {word.strip() for word in out.split()}


def test_bash_completes_commands_options_and_choices(script, tmp_path):
    assert complete(script, "metris pre") == {"predict"}
    assert {name.split()[0] for name in COMMANDS} <= complete(script, "metris ")
    assert complete(script, "metris data ") >= {"check", "show"}
    assert complete(script, "metris predict --thr") == {"--threshold"}
    assert "--model.ratio" in complete(script, "metris train --model.ra")
    assert complete(script, "metris evaluate --protocol cg") == {"cgformer"}
    assert "--optim.learning_rate" in complete(script, "metris train --optim.le")


# ---------------------------------------------------------------------------------------------- many images


@pytest.fixture
def photos(scenes, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, path in enumerate(sorted((scenes / "images" / "train2014").glob("*.jpg"))[:3]):
        shutil.copy(path, folder / f"{number}.jpg")
    (folder / "notes.txt").write_text("not an image")
    return folder


def predict(*arguments):
    return main(["predict", *map(str, arguments)])


def test_folder_is_predicted_as_its_images_are(bold_run, photos, tmp_path, capsys):
    arguments = ("--checkpoint", bold_run, "--expression", "star")
    assert predict(*arguments, "--image", photos, "--out", tmp_path / "many", "--json") == 0
    entries = json.loads(capsys.readouterr().out)
    assert [entry["image"] for entry in entries] == [str(photos / f"{n}.jpg") for n in range(3)]
    assert predict(*arguments, "--image", photos / "1.jpg", "--out", tmp_path / "one.png") == 0
    one, same = Image.open(tmp_path / "one.png"), Image.open(entries[1]["mask"])
    assert (np.asarray(one) == np.asarray(same)).all()
    masks = {np.asarray(Image.open(entry["mask"])).tobytes() for entry in entries}
    assert len(masks) == 3  # none empty, none written over another
    assert same.size == open_image(photos / "1.jpg").size


def test_table_has_a_row_an_answer_under_one_heading(run, photos, tmp_path, capsys):
    asked = ["star", "the large red circle"]
    expressions = [part for sentence in asked for part in ("--expression", sentence)]
    assert predict("--checkpoint", run, "--image", photos, *expressions, "--out", tmp_path / "m") == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["image", "expression", "mask", "overlay", "area"] and len(rows) == 6
    at = head.index("expression"), head.index("mask")
    assert [row[slice(*at)].strip() for row in rows] == 3 * asked


def test_list_brings_its_own_sentences(run, photos, tmp_path, capsys):
    rows = [{"image": "0.jpg", "expression": ["star", "circle"]}, {"image": "2.jpg", "expression": "a: [b"}]
    (photos / "list.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    out = ("--out", tmp_path / "m", "--json")
    assert predict("--checkpoint", run, "--image", photos / "list.jsonl", *out) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [(e["image"][-5:], e["expression"]) for e in entries] == [
        ("0.jpg", "star"),
        ("0.jpg", "circle"),
        ("2.jpg", "a: [b"),
    ]
    assert len({entry["mask"] for entry in entries}) == 3


def test_broken_image_of_many_is_named_and_left_out(run, photos, tmp_path, capsys):
    (photos / "1.jpg").write_bytes(b"no image")
    out = ("--out", tmp_path / "m", "--json")
    assert predict("--checkpoint", run, "--image", photos, "--expression", "star", *out) == 0
    caught = capsys.readouterr()
    assert len(json.loads(caught.out)) == 2 and not any("1.jpg" in e["image"] for e in json.loads(caught.out))
    for path in photos.glob("*.jpg"):
        path.write_bytes(b"no image")
    assert predict("--checkpoint", run, "--image", photos, "--expression", "star", *out) == 2


@pytest.mark.filterwarnings("error")
def test_broken_image_of_many_is_a_warning(run, photos, tmp_path):
    (photos / "1.jpg").write_bytes(b"no image")
    with pytest.raises(UserWarning, match=r"1\.jpg: not an image of a known kind.*left out"):
        predict(
            "--checkpoint", run, "--image", photos, "--expression", "star", "--out", tmp_path / "m", "--json"
        )


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "list.jsonl:1: not JSON"),
        ('{"image": 3}', "'image'"),
        ('{"expression": "star"}', "'image'"),
        ('{"image": "0.jpg"}', "has no 'expression'"),
        ('{"image": "0.jpg", "expression": [1]}', "expected a sentence or a list of them"),
        ("", "holds no image"),
    ],
)
def test_lists_that_cannot_be_used_are_one_line(line, says, run, photos, tmp_path, capsys):
    (photos / "list.jsonl").write_text(line)
    assert predict("--checkpoint", run, "--image", photos / "list.jsonl", "--out", tmp_path / "m") == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1 and not (tmp_path / "m").exists()


def test_what_ails_all_images_stops_at_once(run, photos, tmp_path, monkeypatch, capsys):
    """A place that cannot be written or a model that cannot run is no image's fault."""
    from reference_model.viewing import predict as room

    arguments = ("--checkpoint", run, "--image", photos, "--expression", "star", "--out", tmp_path / "m")
    for part in ("_save", "_answers"):
        tried = []

        def broken(*_, tried=tried):
            tried.append(1)
            raise InputError("no space left")

        with monkeypatch.context() as patch:
            patch.setattr(room, part, broken)
            assert predict(*arguments) == 2
        assert len(tried) == 1 and "no space left" in capsys.readouterr().err
    broken = shutil.copytree(run, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    assert predict("--checkpoint", broken, *arguments[2:]) == 2
    err = capsys.readouterr().err
    assert "model.safetensors: cannot be read" in err and "left out" not in err


def test_sentence_without_a_word_costs_its_image_alone(run, photos, tmp_path, capsys):
    rows = [{"image": "0.jpg", "expression": "\u200b"}, {"image": "2.jpg", "expression": "star"}]
    (photos / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.warns(UserWarning, match="has no word.*left out"):
        assert (
            predict("--checkpoint", run, "--image", photos / "list.jsonl", "--out", tmp_path / "m", "--json")
            == 0
        )
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["image"].endswith("2.jpg")


def test_broken_samples_of_a_data_set_stop_predict_or_are_counted(run, scenes, tmp_path, capsys):
    root = shutil.copytree(scenes, tmp_path / "data")
    groups = spaced_images(read(DataConfig(root)), "val", 100)
    groups[0][0].image.write_bytes(b"no image")
    gone, whole = len(groups[0]), sum(map(len, groups))
    given = ("--checkpoint", run, "--data.root", root, "--count", whole, "--out", tmp_path / "p", "--json")
    assert predict(*given) == 2
    assert "not an image of a known kind" in capsys.readouterr().err
    with pytest.warns(UserWarning, match=f"; {gone} of {whole} samples left out"):
        assert predict(*given, "--data.on_error", "skip") == 0
    assert len(json.loads(capsys.readouterr().out)) == whole - gone


def test_folder_without_a_sentence_says_what_to_add(run, photos, capsys):
    assert predict("--checkpoint", run, "--image", photos) == 2
    assert "--expression" in capsys.readouterr().err


def test_one_image_is_no_list(photos):
    assert jobs(photos / "0.jpg", ["star"]) is None and PredictConfig(checkpoint=photos).out is None
