"""A model goes to a folder or the Hub and comes back the same, with a card that says what is known."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, errors
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from reference_model import METRIS, build
from reference_model.checkpoints import hub as sharing
from reference_model.checkpoints.checkpoint import RENAMED, load_checkpoint, save_weights, start_checkpoint
from reference_model.cli import main
from reference_model.configs import to_yaml
from reference_model.data.config import DataConfig
from reference_model.files import InputError
from reference_model.model.build import build_metris
from reference_model.model.config import ModelConfig
from reference_model.tokens import build_tokenizer
from reference_model.training.config import TrainConfig

METRICS = {
    "val": {
        "METRIS": {"mIoU": 0.5123, "oIoU": 0.25, "P@0.5": 1.0, "count": 7},
        "largest object": {"mIoU": 0.3, "oIoU": 0.2, "P@0.5": 0.0, "count": 7},
    },
    "testA": {"METRIS": {"mIoU": 0.75, "oIoU": float("nan"), "P@0.5": 0.5, "count": 3}},
}
PARTS = {"model.safetensors", "config.yaml", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"}
KNOWN = PARTS | {"metrics.json", "README.md", "generated.json"}


@pytest.fixture(scope="session")
def finished(small, scenes, tmp_path_factory) -> Path:
    """A folder as train and evaluate leave it: weights, config, tokenizer, log, metrics."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    torch.manual_seed(1)
    config = TrainConfig(data=DataConfig(root=scenes), out=folder, model=small, steps=4, batch_size=9)
    start_checkpoint(folder, to_yaml(config), build_tokenizer(["the red boat on the left"]))
    save_weights(folder, build_metris(small))
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    (folder / "log.jsonl").write_text("{}\n")
    shutil.copyfile(scenes / "generated.json", folder / "generated.json")
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def fresh(small) -> METRIS:
    return build(small, tokenizer=build_tokenizer(["the red boat"])).eval()


@pytest.fixture
def hub(monkeypatch):
    """A Hub that keeps what it is given in ``hub.files`` and ``hub.calls``."""
    hub = SimpleNamespace(files={}, calls=[], public=False, refuses=None)

    class Api:
        def __init__(self, **options):
            hub.calls.append(("api", options))

        def create_repo(self, repo_id, **options):
            if hub.refuses is not None:
                raise hub.refuses
            hub.calls.append(("create_repo", repo_id, options))
            repo_id = repo_id if "/" in repo_id else f"somebody/{repo_id}"
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def model_info(self, repo_id):
            return SimpleNamespace(private=not hub.public)

        def upload_folder(self, *, repo_id, folder_path, **options):
            hub.calls.append(("upload_folder", repo_id, options))
            hub.files = {name: (Path(folder_path) / name).read_bytes() for name in files(folder_path)}

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return hub


def files(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def outputs(model) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(2, 3, 64, 64, generator=generator)
    ids = torch.randint(5, 90, (2, 6), generator=generator)
    with torch.inference_mode():
        return [
            x for x in model(images, ids, torch.ones(2, 6, dtype=torch.bool)) if isinstance(x, torch.Tensor)
        ]


def assert_same(one, other):
    one_state, other_state = one.state_dict(), other.state_dict()
    assert one_state.keys() == other_state.keys()
    assert all(one_state[name].equal(other_state[name]) for name in one_state)
    assert all(a.equal(b) for a, b in zip(outputs(one), outputs(other), strict=True))


def rewrite(folder, change):
    """Replace the weights of a checkpoint by what ``change`` makes of them."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def refusal(call, *arguments, **options) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --------------------------------------------------------------------------------------------------- folders


def test_saved_model_comes_back_bit_exact_with_config_and_tokenizer(fresh, tmp_path):
    fresh.save_pretrained(tmp_path / "a" / "shared")
    loaded = METRIS.from_pretrained(str(tmp_path / "a" / "shared"))
    assert_same(fresh, loaded)
    assert not loaded.training and loaded.config == fresh.config
    assert isinstance(loaded.tokenizer, PreTrainedTokenizerBase)
    assert loaded.tokenizer.get_vocab() == fresh.tokenizer.get_vocab()
    assert files(tmp_path / "a") == {f"shared/{name}" for name in PARTS | {"README.md"}}
    assert_same(fresh, load_checkpoint(tmp_path / "a" / "shared").model)


def test_run_of_train_is_loaded_and_saved_with_its_scores_and_settings(run, tmp_path):
    METRIS.from_pretrained(run).save_pretrained(tmp_path / "shared")
    assert files(tmp_path / "shared") == KNOWN
    assert_same(METRIS.from_pretrained(run), METRIS.from_pretrained(tmp_path / "shared"))
    settings = yaml.safe_load((tmp_path / "shared" / "config.yaml").read_text())
    assert (settings["steps"], settings["data"]["split_by"]) == (4, "unc")
    assert str(tmp_path) not in (tmp_path / "shared" / "config.yaml").read_text()
    METRIS.from_pretrained(tmp_path / "shared").save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["val"] == METRICS["val"]


def test_scores_do_not_follow_weights_that_were_changed(run, tmp_path):
    model = METRIS.from_pretrained(run)
    with torch.no_grad():
        model.decoder.head.bias += 1e-3
    model.save_pretrained(tmp_path / "shared")
    assert files(tmp_path / "shared") == PARTS | {"README.md"}
    assert "no scores of `metris evaluate` came with" in (tmp_path / "shared" / "README.md").read_text()
    assert yaml.safe_load((tmp_path / "shared" / "config.yaml").read_text()).keys() == {"model"}


def test_saving_onto_a_checkpoint_replaces_it_whole(run, fresh, tmp_path):
    METRIS.from_pretrained(run).save_pretrained(tmp_path / "shared")
    fresh.save_pretrained(tmp_path / "shared")
    assert files(tmp_path / "shared") == PARTS | {"README.md"}
    assert_same(fresh, METRIS.from_pretrained(tmp_path / "shared"))


@pytest.mark.parametrize("part", ["save_weights", "start_checkpoint", "model_card"])
def test_interrupted_save_leaves_the_old_checkpoint_and_nothing_else(part, run, fresh, tmp_path, monkeypatch):
    METRIS.from_pretrained(run).save_pretrained(tmp_path / "out" / "shared")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    real = getattr(sharing, part)

    def interrupted(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(sharing, part, interrupted)
    with pytest.raises(KeyboardInterrupt):
        fresh.save_pretrained(tmp_path / "out" / "shared")
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_folder_with_anything_else_in_it_is_never_replaced(run, fresh, tmp_path):
    before = files(run)
    assert "holds log.jsonl, which is no part of a checkpoint" in refusal(fresh.save_pretrained, run)
    assert files(run) == before
    (tmp_path / "empty").mkdir()
    fresh.save_pretrained(tmp_path / "empty")


def test_model_without_tokenizer_is_neither_saved_nor_pushed(small, hub, tmp_path):
    model = build(small)
    for call, place in ((model.save_pretrained, tmp_path / "shared"), (model.push_to_hub, "me/metris")):
        assert "the model has no tokenizer" in refusal(call, place)
        larger = build_tokenizer([f"word{i}" for i in range(100)])
        assert "but the model has vocab_size 120" in refusal(call, place, tokenizer=larger)
    assert list(tmp_path.iterdir()) == [] and hub.calls == []


# --------------------------------------------------------------------------------- weights that do not fit


def test_missing_and_extra_weights_are_counted_named_and_refused(run):
    def change(weights):
        return {f"odd.{n}": weights.pop(n) for n in list(weights) if n.startswith("decoder.head.")} | weights

    rewrite(run, change)
    line = refusal(METRIS.from_pretrained, run)
    assert re.search(
        r"lacks 2 of \d+ weights \(decoder\.head\.weight, decoder\.head\.bias\) and has 2 that", line
    )
    assert "odd.decoder.head.bias" in line and "odd.decoder.head.weight" in line and "strict=False" in line


def test_of_many_weights_only_the_first_are_named(run):
    rewrite(run, lambda weights: {n: t for n, t in weights.items() if not n.startswith("decoder.")})
    line = refusal(METRIS.from_pretrained, run)
    assert re.search(
        r"lacks \d\d of \d+ weights \(decoder\.[\w.]+, decoder\.[\w.]+, decoder\.[\w.]+, \.\.\.\)", line
    )


def test_without_strict_what_fits_is_loaded_and_one_warning_counts_the_rest(run):
    whole = METRIS.from_pretrained(run).state_dict()
    bias = "decoder.head.bias"
    rewrite(run, lambda weights: {("odd" if n == bias else n): t + 1 for n, t in weights.items()})
    with pytest.warns(UserWarning, match="lacks 1 of") as caught:
        loaded = METRIS.from_pretrained(run, strict=False)
    (warning,) = caught
    assert re.search(rf"lacks 1 of \d+ weights \({bias}\) and has 1 that .* \(odd\)", str(warning.message))
    state = loaded.state_dict()
    assert all(state[name].equal(whole[name] + 1) for name in state if name != bias)
    assert state[bias].isfinite().all() and not state[bias].equal(whole[bias] + 1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: x[:, :-1].contiguous(), r"has shape \(1, 15\), but the config builds \(1, 16\)"),
        (lambda x: x.int(), "is torch.int32, expected floating point"),
        (lambda x: x * float("nan"), "is not finite everywhere"),
    ],
)
def test_unsound_weights_are_refused_even_without_strict(change, says, run):
    rewrite(run, lambda weights: weights | {"decoder.head.weight": change(weights["decoder.head.weight"])})
    for strict in (True, False):
        assert re.search(says, refusal(METRIS.from_pretrained, run, strict=strict))


def test_every_old_name_of_the_table_loads_to_the_same_model(run):
    before = METRIS.from_pretrained(run)

    def back(weights):
        for old, new in RENAMED.items():
            theirs = [name for name in weights if name.startswith(new)]
            assert theirs, f"nothing is called {new}*: the table names what is not there"
            weights |= {old + name.removeprefix(new): weights.pop(name) for name in theirs}
        return weights

    rewrite(run, back)
    # A config of then had none of the keys that came later.
    config = yaml.safe_load((run / "config.yaml").read_text())
    for later in (
        "guidance",
        "match_size",
        "refine",
        "relate",
        "cues",
        "articles",
        "article_ids",
        "no_target",
    ):
        del config["model"][later]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert not any(name.startswith("guidance.") for name in load_file(run / "model.safetensors"))
    after = METRIS.from_pretrained(run)
    assert_same(before, after)
    after.save_pretrained(run.parent / "today")
    assert load_file(run.parent / "today" / "model.safetensors").keys() == before.state_dict().keys()
    assert (run.parent / "today" / "metrics.json").exists()


@pytest.mark.parametrize("strict", [True, False])
def test_old_and_new_names_in_one_file_are_refused(strict, run):
    new = "guidance.extractor."

    def mix(weights):
        name = next(name for name in weights if name.startswith(new))
        return weights | {"extractor." + name.removeprefix(new): weights[name].clone()}

    rewrite(run, mix)
    line = refusal(METRIS.from_pretrained, run, strict=strict)
    assert f"under the old name of {new}*, extractor." in line


def test_learned_temperature_of_an_old_checkpoint_is_its_temperature(run):
    name = "guidance.extractor.aggregation.log_temperature"
    rewrite(run, lambda weights: weights | {name: torch.tensor(0.25).log()})
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"] |= {"learn_aggregation_temperature": True, "straight_through": True}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    learned = load_checkpoint(run)
    assert learned.config.aggregation_temperature == pytest.approx(0.25)
    assert learned.model.guidance.extractor.aggregation.temperature == pytest.approx(0.25)
    rewrite(run, lambda weights: weights | {name: torch.tensor(torch.nan)})
    assert name in refusal(load_checkpoint, run)


def test_key_that_the_config_no_longer_has_is_named(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["enhancer_layers"] = 2
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    line = refusal(METRIS.from_pretrained, run)
    assert "unknown key enhancer_layers, did you mean enhancer_depth?" in line


# --------------------------------------------------------------------------------------------------- the Hub


def test_from_the_hub_come_only_the_parts_of_a_checkpoint(run, monkeypatch, tmp_path):
    asked = {}

    def download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(run)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    loaded = METRIS.from_pretrained("somebody/metris", revision="v1", token="t", cache_dir="c")
    assert_same(loaded, METRIS.from_pretrained(run))
    told = {name: asked[name] for name in ("repo_id", "revision", "token", "cache_dir", "local_files_only")}
    assert list(told.values()) == ["somebody/metris", "v1", "t", "c", False]
    offered = KNOWN | {
        "pytorch_model.bin",
        "x.pkl",
        "tokenizer/x.pkl",
        "tokenizer/x.py",
        "x.py",
        "x.pt",
        "log.jsonl",
    }
    taken = huggingface_hub.utils.filter_repo_objects(offered, allow_patterns=asked["allow_patterns"])
    assert set(taken) == KNOWN


def test_push_uploads_exactly_a_checkpoint_with_its_card(run, hub):
    model = METRIS.from_pretrained(run)
    url = model.push_to_hub("metris", private=True, token="t", commit_message="hello")
    assert url == "https://huggingface.co/somebody/metris"
    assert hub.files.keys() == KNOWN
    (_, api), (_, name, created), (_, repo_id, uploaded) = hub.calls
    assert (api["token"], name, repo_id) == ("t", "metris", "somebody/metris")
    assert (created["private"], created["exist_ok"], uploaded["commit_message"]) == (True, True, "hello")
    # What an earlier push left there and this one lacks would pass for this model's.
    assert {"metrics.json", "tokenizer/*"} <= set(uploaded["delete_patterns"])
    assert 'load("somebody/metris")' in hub.files["README.md"].decode()


def test_private_push_onto_a_public_repository_is_refused_before_the_upload(run, hub):
    hub.public = True
    model = METRIS.from_pretrained(run)
    assert "is there and public" in refusal(model.push_to_hub, "me/metris", private=True)
    assert hub.files == {}
    model.push_to_hub("me/metris")
    assert hub.files


def _answered(kind, status):
    request = SimpleNamespace(url="https://huggingface.co", method="GET")
    return kind("no\nno", response=SimpleNamespace(status_code=status, headers={}, request=request))


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (_answered(errors.HfHubHTTPError, 401), "run hf auth login"),
        (_answered(errors.RepositoryNotFoundError, 404), "the Hub has none of this name, or a private one"),
        (_answered(errors.GatedRepoError, 403), "ask for access"),
        (_answered(errors.RevisionNotFoundError, 404), "no such revision"),
        (_answered(errors.HfHubHTTPError, 500), "try again later"),
        (errors.OfflineModeIsEnabled("offline"), "cannot be reached"),
        (errors.LocalTokenNotFoundError("none"), "hf auth login"),
        (ConnectionError("name resolution\nfailed"), "cannot be reached (name resolution)"),
    ],
)
def test_refusals_of_the_hub_are_one_line_with_the_next_step(error, says, fresh, hub, monkeypatch):
    hub.refuses = error
    line = refusal(fresh.push_to_hub, "me/metris")
    assert says in line and line.startswith("push to me/metris: ")

    def download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert says in refusal(METRIS.from_pretrained, "somebody/metris")


def test_what_is_nowhere_is_one_line_and_paths_never_reach_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    nowhere = refusal(METRIS.from_pretrained, "somebody/nowhere", cache_dir=tmp_path)
    assert "somebody/nowhere: is no folder here" in nowhere and "cannot be reached" in nowhere
    cached = refusal(METRIS.from_pretrained, "nowhere", cache_dir=tmp_path, local_files_only=True)
    assert "nowhere: is no folder here" in cached
    for path in ("./nowhere", "/no/where", "a/b/c"):
        assert "no repository of the Hub can have this name" in refusal(METRIS.from_pretrained, path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    (tmp_path / "file").touch()
    for path in (Path("somebody/nowhere"), "file"):
        assert f"checkpoint {path}: is no folder" in refusal(METRIS.from_pretrained, path)


def test_revision_of_a_folder_is_refused(run):
    assert "without revisions" in refusal(METRIS.from_pretrained, run, revision="main")


# -------------------------------------------------------------------------------------------------- the card


def test_card_parses_and_has_the_scores_of_the_model_alone(run, hub):
    METRIS.from_pretrained(run).push_to_hub("somebody/metris")
    card = ModelCard(hub.files["README.md"].decode())
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "apache-2.0",
        "metris-blocks",
        "image-segmentation",
    )
    assert "referring-image-segmentation" in data.tags and data.model_name == "somebody/metris"
    scores = {(r.dataset_split, r.metric_type): r.metric_value for r in data.eval_results}
    val = {("val", "mIoU"): 51.23, ("val", "oIoU"): 25.0, ("val", "P@0.5"): 100.0}
    assert scores == val | {("testA", "mIoU"): 75.0, ("testA", "P@0.5"): 50.0}
    assert "| val | METRIS | 51.23 | 25.00 | 100.00 | 7 |" in card.text
    assert "| val | largest object | 30.00 |" in card.text
    assert f"| `decoder_dim` | 16 | {ModelConfig().decoder_dim} |" in card.text


def test_card_says_that_generated_scenes_are_not_refcoco(run, scenes, tmp_path):
    generated = json.loads((scenes / "generated.json").read_text())
    METRIS.from_pretrained(run).save_pretrained(tmp_path / "shared")
    card = ModelCard.load(tmp_path / "shared" / "README.md")
    assert card.data.datasets is None and {r.dataset_type for r in card.data.eval_results} == {"generated"}
    assert f"| generated, `train` | {generated['train']} |" in card.text and "Procedural scenes" in card.text
    # Saved once more, far from the data: still not RefCOCO.
    METRIS.from_pretrained(tmp_path / "shared").save_pretrained(tmp_path / "again")
    again = ModelCard((tmp_path / "again" / "README.md").read_text())
    assert again.data.datasets is None
    assert {r.dataset_type for r in again.data.eval_results} == {"generated"}
    assert "| `steps` | 4 |" in card.text and "| `batch_size` | 9 |" in card.text
    # Elsewhere, or of a real data set: what the config says.
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"] |= {"root": str(tmp_path / "REFER"), "dataset": "refcoco+"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "generated.json").unlink()
    METRIS.from_pretrained(run).save_pretrained(tmp_path / "other")
    card = ModelCard.load(tmp_path / "other" / "README.md")
    assert card.data.datasets == ["refcoco+"] and card.data.eval_results[0].dataset_name == "refcoco+ (unc)"
    assert "Procedural" not in card.text and str(tmp_path) not in card.content


def test_card_without_a_run_claims_nothing(fresh, tmp_path):
    fresh.save_pretrained(tmp_path / "shared")
    card = ModelCard.load(tmp_path / "shared" / "README.md")
    assert card.data.eval_results is None and card.data.datasets is None
    assert "Not known" in card.text and "no scores of `metris evaluate` came with" in card.text


def test_example_of_the_card_runs_as_printed(run, tmp_path, monkeypatch):
    METRIS.from_pretrained(run).save_pretrained(tmp_path / "shared")
    Image.new("RGB", (70, 50), "red").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "shared" / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["masks"].shape == (2, 50, 70) and names["masks"].dtype == bool


@pytest.mark.parametrize("text", ["{", "[1]", '{"val": 3}', '{"val": {"METRIS": 3}}'])
def test_broken_metrics_are_refused_by_name(text, run, tmp_path):
    (run / "metrics.json").write_text(text)
    model = METRIS.from_pretrained(run)
    assert f"{run / 'metrics.json'}: does not hold" in refusal(model.save_pretrained, tmp_path / "shared")
    assert not (tmp_path / "shared").exists()


# ----------------------------------------------------------------------------------------------- the command


def test_push_from_the_command_line(run, hub, capsys):
    assert main(["push", "--checkpoint", str(run), "--repo", "somebody/metris", "--private"]) == 0
    assert capsys.readouterr().out == "https://huggingface.co/somebody/metris\n"
    assert hub.files.keys() == KNOWN and hub.calls[1][2]["private"] is True
    assert main(["push", "--checkpoint", str(run), "--repo", "somebody/metris", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"url": "https://huggingface.co/somebody/metris"}
    assert hub.calls[4][2]["private"] is None
    hub.refuses = _answered(errors.HfHubHTTPError, 401)
    assert main(["push", "--checkpoint", str(run), "--repo", "somebody/metris"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("metris: error: push to somebody/metris: ") and err.count("\n") == 1
