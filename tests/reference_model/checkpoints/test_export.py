"""The model outside Python: what `metris export` writes gives what its checkpoint gives."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from metris_blocks.ops import top_r_mask
from reference_model.checkpoints import export
from reference_model.checkpoints.checkpoint import Checkpoint, load_checkpoint
from reference_model.checkpoints.export import selection
from reference_model.cli import main
from reference_model.configs import build, preset_file, read_yaml
from reference_model.files import InputError
from reference_model.model.build import build_metris
from reference_model.model.config import ModelConfig
from reference_model.model.metris import METRIS
from reference_model.tokens import build_tokenizer
from reference_model.training.config import TrainConfig

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module", params=["onnx", "pt2"])
def file(request, run, tmp_path_factory) -> Path:
    """The trained checkpoint, exported by the command."""
    out = tmp_path_factory.mktemp("exported") / f"model.{request.param}"
    assert main(["export", "--checkpoint", str(run), "--format", request.param, "--out", str(out)]) == 0
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    return out


def inputs(config: ModelConfig, images: int, sentences: int, words: int) -> tuple[torch.Tensor, ...]:
    """Random inputs, sentences of several lengths."""
    lengths = (words - torch.arange(sentences) % words).clamp_min(2)
    return (
        torch.randn(images, 3, config.image_size, config.image_size),
        torch.randint(5, config.vocab_size, (sentences, words)),
        torch.arange(words) < lengths[:, None],
        torch.arange(sentences) % images,
    )


def assert_same_as(model, exported, given) -> None:
    """Hold a program against its model: 1e-4 of the logits, and exactly the top r of its own scores."""
    with torch.no_grad():
        mine, theirs = model(*given), exported.model(*given)
    assert (mine.grid, mine.extent) == (theirs.grid, theirs.extent)
    assert (mine.logits - theirs.logits).abs().max() <= 1e-4 * max(1, mine.logits.abs().max())
    assert (mine.no_target is None) == (theirs.no_target is None)
    if mine.no_target is not None:
        torch.testing.assert_close(theirs.no_target, mine.no_target, rtol=0, atol=1e-4)
    if mine.scores is None:
        assert theirs.scores is None and theirs.dynamic_mask is None
        return
    torch.testing.assert_close(theirs.scores, mine.scores, rtol=0, atol=1e-5)
    assert theirs.dynamic_mask.equal(mine.dynamic_mask)
    if model.cues == "all":
        own = top_r_mask(theirs.scores, exported.config.ratio) & given[2][..., None]
        assert theirs.dynamic_mask.equal(own)


def test_exported_model_gives_what_the_checkpoint_gives_at_all_sizes(file, run):
    model, exported = load_checkpoint(run).model, export.load(file)
    for images, sentences, words in ((1, 1, 3), (1, 4, 8), (3, 3, 16), (2, 7, exported.config.max_tokens)):
        assert_same_as(model, exported, inputs(exported.config, images, sentences, words))


def test_predict_takes_the_file_in_place_of_the_checkpoint(file, run, scenes, tmp_path):
    photo = next((scenes / "images" / "train2014").glob("*.jpg"))
    for name, source in (("mine", run), ("theirs", file)):
        arguments = ["--image", str(photo), "--expression", "the red star", "--threshold", "0.4"]
        out = ["--out", str(tmp_path / f"{name}.png")]
        assert main(["predict", "--checkpoint", str(source), *arguments, *out]) == 0
    assert np.array_equal(*(np.array(Image.open(tmp_path / f"{name}.png")) for name in ("mine", "theirs")))
    together = export.load(file).predict(photo, ["star", "the large blue circle on the left"])
    assert np.array_equal(together[:1], load_checkpoint(run).predict(photo, ["star"]))


def test_file_of_the_first_version_loads(run, scenes, monkeypatch, tmp_path):
    """Its config has options that are gone, and its recipe may lack what the images are normalised by."""
    about = export._about

    def of_before(checkpoint):
        found = about(checkpoint)
        gone = {"straight_through": True, "learn_aggregation_temperature": False}
        kept = {key: value for key, value in found.items() if key not in ("mean", "std")}
        return kept | {"model": found["model"] | gone}

    monkeypatch.setattr(export, "_about", of_before)
    export.save_exported(load_checkpoint(run), tmp_path / "a.pt2", format="pt2")
    photo = next((scenes / "images" / "train2014").glob("*.jpg"))
    whole, old = (
        one.predict(photo, ["the red star"], return_scores=True).probabilities
        for one in (load_checkpoint(run), export.load(tmp_path / "a.pt2"))
    )
    np.testing.assert_allclose(old, whole, atol=1e-5)


def test_file_tells_other_programs_how_to_use_it(file, run):
    config = load_checkpoint(run).config
    if file.suffix == ".onnx":
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        about = json.loads(session.get_modelmeta().custom_metadata_map["metris"])
        types = {"image": "float", "token_ids": "int64", "language_mask": "bool", "image_index": "int64"}
        assert {x.name: x.type for x in session.get_inputs()} == {k: f"tensor({v})" for k, v in types.items()}
        fixed = [x for x in session.get_inputs()[0].shape if isinstance(x, int)]
        assert fixed == [3, config.image_size, config.image_size]
        assert session.get_outputs()[0].name == "logits"
    else:
        found = {"metris.json": ""}
        torch.export.load(file, extra_files=found)
        about = json.loads(found["metris.json"])
    assert about["threshold"] == 0.5 and about["mean"] == [0.485, 0.456, 0.406]
    assert (about["image_size"], about["max_tokens"]) == (config.image_size, config.max_tokens)
    assert "[CLS]" in about["tokenizer"]["tokenizer.json"]


def test_chat_template_of_a_tokenizer_is_no_part_of_the_file(run, tmp_path):
    checkpoint = load_checkpoint(run)
    checkpoint.tokenizer.chat_template = "{{ messages }}"
    export.save_exported(checkpoint, tmp_path / "a.pt2", format="pt2")
    ids = [
        found.tokenizer("the red star")["input_ids"]
        for found in (export.load(tmp_path / "a.pt2"), checkpoint)
    ]
    assert ids[0] == ids[1]


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--out", "a.pt2"], r"out a\.pt2: must end in \.onnx"),
        (["--out", "a.bin", "--format", "pt2"], r"out a\.bin: must end in \.pt2"),
        (["--out", "a.onnx", "--format", "coreml"], "format"),
    ],
)
def test_export_refuses_in_one_line(arguments, says, run, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--checkpoint", str(run), *arguments]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert re.search(says, lines[0])
    assert not list(tmp_path.iterdir())


def test_file_that_differs_from_the_model_is_not_written(run, tmp_path, monkeypatch):
    checkpoint, program = load_checkpoint(run), export.export_program
    model = checkpoint.model

    def spoilt(model):
        found = program(model)
        with torch.no_grad():
            found.state_dict["model.decoder.head.bias"].copy_(torch.ones(1))
        return found

    monkeypatch.setattr(export, "export_program", spoilt)
    before = model.decoder.head.bias.detach().clone()
    (tmp_path / "a.pt2").write_text("mine")
    monkeypatch.setattr(export, "load_exported", undone(export.load_exported, model, before))
    with pytest.raises(InputError, match=r"a\.pt2: not written, its logits differ from the model's by"):
        export.save_exported(checkpoint, tmp_path / "a.pt2", format="pt2")
    assert (tmp_path / "a.pt2").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def undone(function, model, bias):
    """Call after giving the model its own bias back: it shares its weights with the program."""

    def run(*args, **kwargs):
        with torch.no_grad():
            model.decoder.head.bias.copy_(bias)
        return function(*args, **kwargs)

    return run


class Held(NamedTuple):
    """A model, and what a perfect program of it answers."""

    model: METRIS
    answers: dict[str, torch.Tensor | None]
    kept: int
    """The first token kept, each before it is left; the scores rise."""

    def agree(self, **changes: torch.Tensor | None) -> export.Agreement:
        """Hold the model against a program that answers otherwise in some outputs."""
        answers = {name: x for name, x in (self.answers | changes).items() if x is not None}
        program = export.ExportedMetris(lambda _: answers, (4, 4), (64, 64), torch.device("cpu"))
        return export.agreement(self.model, Checkpoint(program, None, self.model.config), Path("a.onnx"))


def held(small: ModelConfig, *, gap: float = 0.1) -> Held:
    """Make a model whose scores rise by a tenth a token, and by ``gap`` to the first one kept."""
    torch.manual_seed(0)
    model = build_metris(replace(small, no_target=True)).eval()
    n = (small.image_size // 16) ** 2
    kept = n - int(top_r_mask(torch.zeros(1, 1, n), model.config.ratio).sum())
    ladder = torch.arange(n) / 10
    ladder[kept:] += gap - 0.1

    def climb(_, __, out):
        scores = ladder.expand(out.scores.shape).clone()
        real = out.dynamic_mask.any(dim=-1, keepdim=True)
        return out._replace(scores=scores, dynamic_mask=top_r_mask(scores, model.config.ratio) & real)

    model.register_forward_hook(climb)
    with torch.no_grad():
        out = model(*export._example(model.config, images=1, sentences=3, words=9).values())
    return Held(model, {name: getattr(out, name) for name in export.OUTPUTS}, kept)


def moved(x: torch.Tensor, *at: int, by: float) -> torch.Tensor:
    x = x.clone()
    x[at] += by
    return x


def test_program_that_agrees_is_told_from_one_that_does_not(small):
    case = held(small)
    logits, scores, _, nothing = case.answers.values()
    assert case.agree() == ({"scores": 0, "logits": 0, "no_target": 0}, 3, 0)
    found = case.agree(logits=moved(logits, 1, 5, 5, by=5e-5), no_target=moved(nothing, 0, by=-3e-5))
    assert found.differences == pytest.approx({"scores": 0, "logits": 5e-5, "no_target": 3e-5}, rel=0.1)
    for says, changes in {
        "its logits differ": {"logits": moved(logits, 2, 5, 5, by=1e-2)},
        "its logits differ.*nan": {"logits": moved(logits, 2, 5, 5, by=float("nan"))},
        "its no_target differ": {"no_target": moved(nothing, 1, by=1e-2)},
        "its scores differ": {"scores": moved(scores, 1, 1, 0, by=-1e-3)},
        "only one of it and the model has no_target": {"no_target": None},
        "only one of it and the model has scores": {"scores": None, "dynamic_mask": None},
        "only one of it and the model has dynamic_mask": {"dynamic_mask": None},
    }.items():
        with pytest.raises(InputError, match=rf"a\.onnx: not written, .*{says}"):
            case.agree(**changes)


def test_selection_may_differ_by_a_near_tie_alone(small):
    near, far = held(small, gap=1e-6), held(small, gap=1e-2)
    logits, scores, mask, nothing = near.answers.values()
    turned = mask.clone()
    turned[0, 1, near.kept - 1 : near.kept + 1] = turned[0, 1, near.kept - 1 : near.kept + 1].flip(0)
    # With the model's own scores it is no top r, however near.
    with pytest.raises(InputError, match="selects is not the top r of its own scores"):
        near.agree(dynamic_mask=turned)
    over = moved(far.answers["scores"], 0, 1, far.kept - 1, by=2e-2)
    with pytest.raises(InputError, match="its scores differ"):
        far.agree(dynamic_mask=turned, scores=over)
    # What follows from a near tie is of its sentence alone.
    follows = {"logits": moved(logits, 0, 3, 3, by=1.0), "no_target": moved(nothing, 0, by=1.0)}
    program = {"dynamic_mask": turned, "scores": moved(scores, 0, 1, near.kept - 1, by=2e-6)} | follows
    found = near.agree(**program)
    assert found.turned == 1 and found.differences["logits"] == found.differences["no_target"] == 0
    assert selection(found) == "near ties turned, and logits not compared, in 1 of 3 sentences"
    with pytest.raises(InputError, match="its logits differ"):
        near.agree(**program | {"logits": moved(logits, 1, 3, 3, by=1.0)})
    with pytest.raises(InputError, match="selects is not the top r of its own scores"):
        near.agree(**program | {"dynamic_mask": mask})


@pytest.mark.parametrize("backend", ["triton", "xformers"])
def test_kernels_that_cannot_be_exported_are_refused(backend, run):
    model = load_checkpoint(run).model
    model.config = replace(model.config, backend=backend)
    with pytest.raises(InputError, match=rf"backend is {backend}.*backend: auto"):
        export.export_program(model)


def test_onnx_beyond_its_size_is_refused_before_any_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_ONNX_BYTES", 1000)
    monkeypatch.setattr(export, "export_program", None)
    with pytest.raises(InputError, match=r"GiB of weights.*--format pt2"):
        export.save_exported(load_checkpoint(run), tmp_path / "a.onnx", format="onnx")


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_file_that_is_no_model_is_refused_by_name(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"not a model")
    with pytest.raises(InputError, match=rf"a\.{suffix}: is no \.?\w+ file that can run"):
        export.load(path)
    (tmp_path / "a.bin").touch()
    with pytest.raises(InputError, match="neither a checkpoint folder nor"):
        export.load(tmp_path / "a.bin")


def test_program_of_another_model_is_refused(tmp_path):
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(program, tmp_path / "a.pt2")
    with pytest.raises(InputError, match=r"a\.pt2: does not say how to use it"):
        export.load(tmp_path / "a.pt2")


# ------------------------------------------------------------------------- every variant, and both presets


# Each graph that configurations can make, several in one model where they do not meet; the trained checkpoint
# above is the usual one. "pixels" holds enhanced_le, and a .pt2 the program that lies on the way to ONNX.
VARIANTS = {
    "pure_le, CLIP": {
        "guidance": "pure_le",
        "text_encoder_options": {"model_type": "clip_text_model", "hidden_size": 24}
        | {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24},
    },
    "pixels, transformers' Swin": {
        "guidance": "enhanced_le+pixels",
        "image_encoder": "transformers/microsoft/swin",
        "image_encoder_options": {"embed_dim": 8, "depths": [2, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
        | {"window_size": 3},
    },
    "ve, the letter, eager": {"guidance": "ve", "norm": "none", "coordinates": True, "backend": "eager"},
    "no target, local cues, no articles, softmax over all, T5": {
        "text_encoder_options": {"model_type": "t5", "d_model": 24, "d_kv": 12, "d_ff": 24}
        | {"num_layers": 2, "num_heads": 2},
        "no_target": True,
        "cues": "local",
        "articles": False,
        "article_ids": [7, 8],
        "mask_softmax": False,
    },
    "global cue, no steps 2 and 3, Llama": {
        "cues": "global",
        "refine": False,
        "relate": False,
        "text_encoder_options": {"model_type": "llama", "hidden_size": 24, "num_hidden_layers": 1}
        | {"num_attention_heads": 2, "intermediate_size": 24},
    },
}


def with_tokenizer(config: ModelConfig):
    return Checkpoint(build_metris(config).eval(), build_tokenizer(["the red star"]), config)


def assert_exports(checkpoint: Checkpoint, out: Path, monkeypatch, longest: int) -> None:
    """Hold the program and its ONNX against the model, which has been training."""
    model = checkpoint.model.train()
    programs, trace = [], export.export_program
    monkeypatch.setattr(export, "export_program", lambda model: programs.append(trace(model)) or programs[0])
    attention = model.text_encoder.bert.config._attn_implementation
    found = export.save_exported(checkpoint, out, format="onnx")
    assert found.turned == 0 and all(part.training for part in model.modules())
    assert model.text_encoder.bert.config._attn_implementation == attention != "eager"
    onnx, run = export.load(out), programs[0].module()
    shape = onnx.model.grid, onnx.model.extent, onnx.model.device
    traced = replace(onnx, model=export.ExportedMetris(lambda given: run(*given.values()), *shape))
    for images, sentences, words in ((1, 3, 3), (2, 5, longest)):
        for exported in (onnx, traced):
            assert_same_as(model.eval(), exported, inputs(model.config, images, sentences, words))


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_exports(name, small, tmp_path, monkeypatch):
    assert_exports(with_tokenizer(replace(small, **VARIANTS[name])), tmp_path / "a.onnx", monkeypatch, 12)


def preset(name: str, image_size: int) -> ModelConfig:
    """A preset without its weights, a vocabulary that suits the test's tokenizer, a smaller image."""
    values = read_yaml(preset_file(name), TrainConfig).get("model", {})
    config = build(ModelConfig, values, source=name)
    return replace(config, pretrained=False, vocab_size=300, image_size=image_size)


PRESETS = [("metris_tiny", 96), ("metris_swin_b", 64)]


@pytest.mark.slow
@pytest.mark.parametrize("name, size", PRESETS)
def test_preset_exports(name, size, tmp_path, monkeypatch):
    assert_exports(with_tokenizer(preset(name, size)), tmp_path / "a.onnx", monkeypatch, 20)


@pytest.mark.slow
@pytest.mark.parametrize("name, size", PRESETS)
def test_preset_compiles_to_one_graph_for_all_batches_and_sentences(name, size):
    torch._dynamo.reset()
    model = build_metris(preset(name, size)).eval().requires_grad_(False)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    # None of the sizes is that of another axis, which would tie both; and of all these words the same kernels
    # are the cheaper ones: where others are (below 10 words at 64 px), a second graph is right.
    for images, sentences, words in ((2, 5, 10), (4, 6, 11), (7, 9, 13)):
        given = inputs(model.config, images, sentences, words)
        for tensor, axes in zip(given, ([0], [0, 1], [0, 1], [0]), strict=True):
            for axis in axes:
                torch._dynamo.mark_dynamic(tensor, axis)
        mine, theirs = model(*given), compiled(*given)
        assert theirs.dynamic_mask.equal(mine.dynamic_mask)
        torch.testing.assert_close(theirs.logits, mine.logits, rtol=0, atol=1e-4)
    assert counter.frame_count == 1
