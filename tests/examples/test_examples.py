"""The blocks in other people's models: what each example changes, that it learns, and whom it listens to."""

import ast
import copy
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn.functional import conv2d, pad, pixel_shuffle
from transformers import CLIPSegForImageSegmentation, Mask2FormerForUniversalSegmentation, SamModel

from examples.scenes import IDS, fit, make_scenes, mask_loss
from examples.timm_backbones import BACKBONES, CELL

ROOT = Path(__file__).parents[2]
NAMES = sorted(
    path.stem for path in (ROOT / "examples").glob("*.py") if path.stem not in ("__init__", "scenes")
)
CASES = [(name,) for name in NAMES if name != "timm_backbones"]
CASES += [("timm_backbones", backbone) for backbone in BACKBONES]
IDS_OF_CASES = ["-".join(case) for case in CASES]
# Their guest hears the sentence by itself; the others hear it through the guidance set alone.
HEARING = {"clipseg", "language_model"}

# Those that tell the sentences apart by the loss after fifty steps, whatever the processor's rounding.
LEARN_TO_LISTEN = {"language_model", *(backbone for backbone in BACKBONES if "vit" in backbone)}


def text(name):
    return (ROOT / "examples" / f"{name}.py").read_text()


def changed(name):
    return [line for line in text(name).splitlines() if line.endswith("# VE")]


def without_changes(name):
    return "\n".join(line for line in text(name).splitlines() if not line.endswith("# VE"))


def build(case, *, guest_alone=False):
    """Build an example, or what is left of it without the changed lines."""
    name, *options = case
    if not guest_alone:
        return import_module(f"examples.{name}").build(*options).eval()
    module = ModuleType(f"guest_of_{name}")
    exec(compile(without_changes(name), f"{name} without VE", "exec"), vars(module))
    return module.build(*options).eval()


@pytest.fixture(scope="module")
def scenes():
    return make_scenes()


@pytest.fixture(scope="module", params=CASES, ids=IDS_OF_CASES)
def example(request, scenes):
    """An example before and after fifty steps."""
    fresh, trained = build(request.param), build(request.param)
    losses = fit(trained, scenes)
    return request.param, fresh, trained.eval(), losses


def logits(model, scenes):
    with torch.no_grad():
        return model(scenes.image, scenes.words, scenes.mask)


def swapped(scenes):
    """The two sentences about each picture, exchanged."""
    turn = lambda x: x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return scenes._replace(words=turn(scenes.words), mask=turn(scenes.mask))


# ------------------------------------------------------------------------------------------ what is written


@pytest.mark.parametrize("name", NAMES)
def test_header_counts_the_changed_lines_and_they_are_few(name):
    header = text(name).split('"""')[1]
    assert re.search(r"^Replaced: ", header, re.MULTILINE)
    stated = int(re.search(r"^Changed: (\d+) lines, marked VE", header, re.MULTILINE)[1])
    assert stated == len(changed(name)) <= 15
    assert f"python -m examples.{name}" in header
    # Nothing of ours without a mark: what is left of the file knows no block.
    left = without_changes(name).split('"""', 2)[2]
    assert not re.search("metris_blocks|extractor|expression|guidance", left)
    # Nor imports anything that only the changed lines use.
    tree = ast.parse(left)
    imported = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert imported <= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def test_readme_lists_every_example_with_its_lines():
    rows = re.findall(
        r"^\| \[`(\w+)`\]\(examples/\w+\.py\) \|.*\| (\d+) \|$", (ROOT / "README.md").read_text(), re.M
    )
    assert {name: int(lines) for name, lines in rows} == {name: len(changed(name)) for name in NAMES}


def test_scenes_have_two_sentences_about_every_picture(scenes):
    pictures = scenes.image.unflatten(0, (-1, 2))
    assert pictures[:, 0].equal(pictures[:, 1]) and not pictures[0, 0].equal(pictures[1, 0])
    assert not (scenes.target.unflatten(0, (-1, 2)).prod(dim=1)).any(), "their objects are different ones"
    assert scenes.target.flatten(1).any(dim=1).all() and len({tuple(x.tolist()) for x in scenes.words}) > 4
    ends = scenes.words.eq(IDS["<end>"])
    assert ends.sum(dim=1).eq(1).all() and ends.int().argmax(dim=1).equal(scenes.mask.sum(dim=1) - 1)


# ------------------------------------------------------------------------------------- what the guest remains


def test_without_the_changed_lines_it_is_the_guest(example, scenes):
    case, *_ = example
    guest = build(case, guest_alone=True)
    assert not hasattr(guest, "extractor")
    found = logits(guest, scenes)
    with torch.no_grad():
        if case[0] == "clipseg":
            names = {"input_ids": scenes.words, "pixel_values": scenes.image, "attention_mask": scenes.mask}
            expected = CLIPSegForImageSegmentation.forward(guest, **names).logits
        elif case[0] == "mask2former":
            out = Mask2FormerForUniversalSegmentation.forward(guest, scenes.image)
            share = out.class_queries_logits[..., 0].softmax(1)[..., None, None]
            expected = (out.masks_queries_logits * share).sum(1)
        elif case[0] == "sam":
            expected = SamModel.forward(guest, scenes.image, multimask_output=False).pred_masks[:, 0, 0]
        elif case[0] == "language_model":
            # Each sentence by itself, without padding: its last state, times every pixel.
            sentences = zip(scenes.words, scenes.mask.sum(dim=1))
            states = [
                guest.language_model(words[None, :k]).last_hidden_state[0, -1] for words, k in sentences
            ]
            pixels = guest.pixels(guest.backbone.forward_features(scenes.image)).flatten(2)
            expected = (torch.stack(states)[:, None] @ pixels).view_as(found)
        else:
            # timm's own way to a map, and the head as a convolution.
            options = {"indices": 1, "norm": True, "intermediates_only": True}
            (features,) = guest.backbone.forward_intermediates(scenes.image, **options)
            cells = conv2d(features, guest.head.weight[..., None, None], guest.head.bias)
            expected = pixel_shuffle(cells, CELL)[:, 0]
    torch.testing.assert_close(found, expected)
    hears = not torch.allclose(found, logits(guest, swapped(scenes)), atol=1e-6)
    assert hears == (case[0] in HEARING)


def test_with_nothing_in_the_guidance_set_it_is_the_guest(example, scenes):
    case, _, model, _ = example
    guest = build(case, guest_alone=True)
    weights = model.state_dict()
    extra = {name.split(".")[0] for name in weights.keys() - guest.state_dict().keys()}
    assert "extractor" in extra and extra <= {"extractor", "text"}
    guest.load_state_dict({name: weights[name] for name in guest.state_dict()})
    silent = scenes if case[0] in HEARING else scenes._replace(mask=torch.zeros_like(scenes.mask))
    nothing = lambda _, __, out: out._replace(dynamic_mask=torch.zeros_like(out.dynamic_mask))
    handle = model.extractor.register_forward_hook(nothing)
    off = logits(model, silent)
    handle.remove()
    expected = logits(guest, scenes)
    torch.testing.assert_close(off, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    on = logits(model, scenes)
    assert not torch.allclose(on, expected, rtol=1e-3, atol=1e-4)


def test_model_that_has_run_is_copied_whole_and_the_copy_stands_alone(example, scenes):
    _, model, _, _ = example
    # With its graph still alive, which no copy can have.
    loss = mask_loss(model, scenes)
    other = copy.deepcopy(model)
    plain = logits(model, scenes)
    assert logits(other, scenes).equal(plain)
    for p in other.extractor.parameters():
        p.data.mul_(-2)
    assert not logits(other, scenes).allclose(plain), "the copy hears its own extractor"
    assert logits(model, scenes).equal(plain)
    loss.backward()


# --------------------------------------------------------------------------------------- whom it listens to


def test_fifty_steps_lower_the_loss_of_the_masks(example, scenes):
    _, fresh, trained, losses = example
    assert len(losses) == 50
    with torch.no_grad():
        assert mask_loss(trained, scenes) < 0.5 * mask_loss(fresh, scenes)


def test_after_them_the_wrong_sentence_costs(example, scenes):
    case, _, trained, _ = example
    if case[-1] not in LEARN_TO_LISTEN:
        pytest.skip("fifty steps lower its loss by far less than a tenth more with the right sentence")
    with torch.no_grad():
        right, wrong = mask_loss(trained, scenes), mask_loss(trained, swapped(scenes))
    assert wrong > 1.2 * right


def test_masks_train_every_parameter_of_the_extractor(example, scenes):
    _, fresh, _, _ = example
    fresh.zero_grad()
    mask_loss(fresh, scenes).backward()
    silent = [name for name, p in fresh.extractor.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_what_the_extractor_hears_changes_the_mask(example, scenes):
    _, fresh, _, _ = example
    plain = logits(fresh, scenes)
    other = lambda _, args, kwargs: (
        (args[0], args[1].flip(0)),
        kwargs | {"language_mask": kwargs["language_mask"].flip(0)},
    )
    handle = fresh.extractor.register_forward_pre_hook(other, with_kwargs=True)
    changed_logits = logits(fresh, scenes)
    handle.remove()
    rounding = 1e-5 * float(plain.abs().max())
    # Pictures of one sentence each way round apart: all hear another one.
    assert (changed_logits - plain).abs().flatten(1).amax(dim=1).gt(rounding).all()


def test_padding_changes_no_mask(example, scenes):
    case, _, trained, _ = example
    plain = logits(trained, scenes)
    same = {"rtol": 1e-4, "atol": 1e-5 * float(plain.abs().max())}
    more = scenes._replace(words=pad(scenes.words, (0, 3), value=IDS["red"]), mask=pad(scenes.mask, (0, 3)))
    more = more._replace(words=more.words.where(more.mask, IDS["blue"]))
    torch.testing.assert_close(logits(trained, more), plain, **same)
    if case[0] == "language_model":
        places = more.mask.long().argsort(dim=1, stable=True)
        left = more._replace(words=more.words.gather(1, places), mask=more.mask.gather(1, places))
        assert left.mask[:, -1].all() and not left.mask[:, 0].any()
        torch.testing.assert_close(logits(trained, left), plain, **same)
