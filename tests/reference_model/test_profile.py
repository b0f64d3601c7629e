"""`metris profile`: what is counted, by hand; what adds up; what the command takes and prints."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from metris_blocks.layers import MultiHeadAttention
from reference_model import cost
from reference_model import profile as command
from reference_model.cli import main, parse
from reference_model.cost import latencies, multiply_adds, peak_bytes
from reference_model.model.build import build_metris
from reference_model.profile import PARTS

TINY = ("profile", "--preset", "metris_tiny", "--rounds", "1")


@pytest.fixture
def profiled(capsys):
    """Run the command on the tiny preset and read its JSON, with the parts by name."""

    def run(*options):
        assert main([*TINY, "--json", *map(str, options)]) == 0
        report = json.loads(capsys.readouterr().out)
        return report, {row["part"]: row for row in report["parts"]}

    return run


def tiny():
    return parse("profile", list(TINY[1:])).model


# ------------------------------------------------------------------------------------------------- counting


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize(("l", "n"), [(5, 11), (11, 5)], ids=["flash on the CPU", "math on the CPU"])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_counted(backend, l, n, masked):
    dim, width = 16, 24
    attention = MultiHeadAttention(dim, width, num_heads=2, backend=backend).eval()
    mask = torch.ones(1, l, n, dtype=torch.bool) if masked else None
    with torch.inference_mode():
        counted = multiply_adds(attention, torch.randn(1, l, dim), torch.randn(1, n, width), mask)
    projections = 2 * l * dim * dim + 2 * n * width * dim
    assert counted[""] == projections + 2 * l * n * dim
    assert counted["q_proj"] == counted["out_proj"] == l * dim * dim


def test_text_encoder_is_counted_with_its_attention():
    model = build_metris(tiny()).eval()
    l, d, hidden, layers = 9, 128, 256, 2
    ids, mask = torch.ones(1, l, dtype=torch.long), torch.ones(1, l, dtype=torch.bool)
    with torch.inference_mode():
        counted = multiply_adds(model, torch.randn(1, 3, 96, 96), ids, mask)["text_encoder"]
    assert counted == layers * (4 * l * d * d + 2 * l * l * d + 2 * l * d * hidden)


def kernels(b=2, l=3, n=5, heads=2, e=4, c=6):
    """Opaque kernel -> what it is called with, and its multiply-adds by hand."""
    meta = lambda *shape: torch.empty(shape, device="meta")
    query, key, mask = meta(b, l, heads, e), meta(b, n, heads, e), meta(b, l, n).bool()
    attention = ((query, key, key, mask, 0.5), 2 * b * l * n * heads * e)
    return {
        "xformers_attention": attention,
        "triton_attention": attention,
        "triton_score": ((meta(b, n, c), meta(b, l, c)), b * l * n * c),
        "triton_aggregate": ((meta(b, l, n), mask, meta(b, n, c), 1.0, True), b * l * n * c),
    }


@pytest.mark.parametrize("name", kernels())
def test_opaque_kernels_are_counted(name):
    arguments, by_hand = kernels()[name]

    class Kernel(torch.nn.Module):
        def forward(self, *arguments):
            return getattr(torch.ops.metris_blocks, name)(*arguments)

    assert multiply_adds(Kernel(), *arguments)[""] == by_hand


def test_peak_is_what_is_held_at_once():
    make = lambda: torch.empty(2**20, dtype=torch.uint8)
    kept = make()

    def together():
        return make(), make(), kept

    def in_turn():
        make()
        make()

    assert (peak_bytes(together), peak_bytes(in_turn)) == (2 * 2**20, 2**20)


def test_calls_take_turns_and_the_first_round_is_left_out(monkeypatch):
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}

    def clock(call, device):
        call()
        return float(len(order))

    monkeypatch.setattr(cost, "_milliseconds", clock)
    assert latencies(calls, range(3), torch.device("cpu")) == {"a": [3, 5], "b": [4, 6]}
    assert order == ["a", "b"] * 3


# ------------------------------------------------------------------------------------------------ the report


@pytest.mark.parametrize(
    ("variant", "parts"),
    [
        ({}, {"extractor"}),
        ({"guidance": "enhanced_le+pixels", "no_target": True}, {"pixels", "no-target head"}),
        ({"guidance": "pure_le", "match_size": True}, set()),
    ],
    ids=["paper", "pixels", "pure LE"],
)
def test_parts_add_up_to_the_whole(profiled, variant, parts):
    _, rows = profiled(*(f"--model.{name}={value}" for name, value in variant.items()))
    model = build_metris(replace(tiny(), **variant))
    whole, plain = rows["whole model"], rows["plain image encoder"]
    always = {"image encoder", "text encoder", "language enhancer", "decoder"}
    assert rows.keys() & PARTS.keys() == always | parts
    for column in ("parameters_M", "GMACs", "GMACs_%"):
        found = sum(rows[part][column] for part in rows.keys() & PARTS.keys())
        assert math.isclose(found, whole[column], rel_tol=1e-9), column
        assert 0 < plain[column] <= rows["image encoder"][column] < whole[column]
    assert whole["parameters_M"] == sum(p.numel() for p in model.parameters()) / 1e6
    assert plain["parameters_M"] == sum(p.numel() for p in model.image_encoder.backbone.parameters()) / 1e6
    assert all(row["ms"] > 0 and row["peak_MiB"] > 0 for row in rows.values())
    assert all(whole["peak_MiB"] >= rows[part]["peak_MiB"] for part in rows.keys() & PARTS.keys())


def test_report_says_what_was_measured_where(profiled):
    report, _ = profiled("--sentences", 3, "--batch_size", 2, "--tokens", 7)
    assert report["preset"] == "metris_tiny" and report["torch"] == torch.__version__ and report["device"]
    assert (report["batch_size"], report["tokens"], report["rounds"]) == (2, 7, 1)
    assert report["image_size"] == report["model"]["image_size"] == tiny().image_size
    assert [row["sentences"] for row in report["one_image_encoded_once"]] == [1, 3]


def test_peers_are_named_with_their_source_and_apart_from_what_was_measured(profiled, capsys):
    report, _ = profiled()
    sources = {row["model"]: row["source"] for row in report["not_measured_here"]}
    assert "Table 2" in sources["METRIS"] and "run before" in sources["LAVT Swin-B"]
    assert main(list(TINY)) == 0
    here, elsewhere = capsys.readouterr().out.split("published or run before, not measured here")
    parts = [row["part"] for row in report["parts"]]
    assert all(part in here and part not in elsewhere for part in parts)
    assert all(name in elsewhere and name not in here for name in sources)


def test_sentences_about_one_image_pay_for_it_once(profiled):
    report, rows = profiled("--sentences", 4)
    one, four = (row["GMACs"] for row in report["one_image_encoded_once"])
    assert math.isclose(one, rows["whole model"]["GMACs"])
    assert math.isclose(four, 4 * one - 3 * rows["image encoder"]["GMACs"])


# ----------------------------------------------------------------------------------------------- the options


def test_twice_the_tokens_cost_language_and_not_the_image(profiled):
    (_, short), (_, long) = profiled("--tokens", 10), profiled("--tokens", 20)
    assert long["extractor"]["GMACs"] > short["extractor"]["GMACs"]
    assert long["text encoder"]["GMACs"] > 2 * short["text encoder"]["GMACs"]  # attention is quadratic
    assert long["image encoder"]["GMACs"] == short["image encoder"]["GMACs"]


def test_twice_the_side_costs_four_times_the_convolutions(profiled):
    (_, small), (report, large) = profiled("--image_size", 96), profiled("--image_size", 192)
    assert report["image_size"] == 192
    assert math.isclose(large["plain image encoder"]["GMACs"], 4 * small["plain image encoder"]["GMACs"])
    assert large["text encoder"]["GMACs"] == small["text encoder"]["GMACs"]


def test_batch_costs_its_size_and_no_parameter(profiled):
    (_, one), (_, three) = profiled(), profiled("--batch_size", 3)
    # Not the whole image encoder: the map of position is made once a batch.
    for row in three.keys() - {"image encoder", "whole model"}:
        assert math.isclose(three[row]["GMACs"], 3 * one[row]["GMACs"]), row
        assert three[row]["parameters_M"] == one[row]["parameters_M"]


def test_preset_gives_the_model_alone_and_loses_its_name_when_overridden(profiled):
    report, rows = profiled()
    assert report["batch_size"] == 1, "the preset's own is for training"
    other, changed = profiled("--model.decoder_dim", 32)
    assert other["preset"] is None and other["model"]["decoder_dim"] == 32
    assert [part for part in PARTS if part in rows and changed[part]["GMACs"] != rows[part]["GMACs"]] == [
        "decoder"
    ]


def test_pretrained_weights_are_never_fetched(profiled, monkeypatch):
    built = []
    monkeypatch.setattr(
        command, "build_metris", lambda config: built.append(config.pretrained) or build_metris(config)
    )
    report, _ = profiled("--model.pretrained", "true")
    assert built == [False] and report["preset"] == "metris_tiny"


def test_config_file_gives_options_of_profile(profiled, tmp_path):
    (tmp_path / "c.yaml").write_text("tokens: 6\nmodel: {ratio: 0.5}\n")
    report, _ = profiled("--config", tmp_path / "c.yaml")
    assert (report["tokens"], report["model"]["ratio"]) == (6, 0.5)


def test_threads_are_what_torch_uses(profiled):
    before = torch.get_num_threads()
    try:
        assert profiled("--threads", before + 1)[0]["threads"] == torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_help_needs_no_torch():
    probe = (
        "import sys; from reference_model.cli import main\n"
        "main(['--help'])\n"
        "try: main(['profile', '--help'])\n"
        "except SystemExit: pass\n"
        "print({'torch', 'transformers', 'timm'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--preset", "metris_tinny"], "preset metris_tinny: unknown, did you mean metris_tiny?"),
        (["--tokens", "2"], "tokens: must be in [3, 512], what the text encoder can place; got 2"),
        (["--tokens", "8", "--model.text_encoder_options.max_position_embeddings", "7"], "[3, 7]"),
        (["--rounds", "0"], "rounds: must be in [1, 1024], got 0"),
        (["--batch_size", "-1"], "batch_size: must be in [1, 1024], got -1"),
        (["--sentences", "0"], "sentences: must be in [1, 1024], got 0"),
        (["--threads", "0"], "threads: must be in [1, 1024], got 0"),
        (["--image_size", "5"], "image_size must be in [32, 4096], got 5"),
        (["--device", "meta"], "device meta: cannot be measured here; use cpu or cuda"),
        (["--device", "toaster"], "device toaster: cannot be used"),
        (["--model.raito", "0.3"], "unknown key model.raito, did you mean model.ratio?"),
        (["--epochs", "3"], "unknown key epochs"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(options, says, capsys):
    assert main([*TINY, *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("metris: error: ") and err.count("\n") == 1 and says in err


def test_too_little_memory_is_one_line(capsys, monkeypatch):
    def refuse(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(command, "_measured", refuse)
    assert main([*TINY, "--json"]) == 2
    assert "has too little memory; lower batch_size" in capsys.readouterr().err
