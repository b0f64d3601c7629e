"""The public names of the library, with their parameters and defaults: none changes unnoticed.

Public is what a package lists in ``__all__``, and whatever a module defines without an underscore.
"""

import ast
import inspect
from importlib import import_module
from pathlib import Path

import pytest

import metris_blocks

ROOT = Path(metris_blocks.__file__).parent
# How an op is computed, and what checks its arguments: for the library alone.
INTERNAL = ("metris_blocks.ops.backends.", "metris_blocks.ops.masks", "metris_blocks.ops.shapes")

_LAYER = "num_heads=8, mlp_ratio=4.0, dropout=0.0, norm='pre', backend='auto'"
_MASKS = "visual_mask=None, language_mask=None"

PUBLIC = {
    "metris_blocks": {
        "Curation": "scores, dynamic_mask",
        "DynamicMaskCrossAttention": f"dim, visual_dim, *, {_LAYER}",
        "DynamicMaskCrossAttention.forward": "aggregated, visual, dynamic_mask, *, assume_finite=False",
        "GlobalCue": "language_dim, kind",
        "GlobalCue.forward": "language, language_mask=None",
        "GuidanceSet": "tokens, mask",
        "GuidanceSet.join": "*parts",
        "LanguageEnhancer": f"language_dim, visual_dim, *, depth=2, {_LAYER}",
        "LanguageEnhancer.forward": f"language, visual, *, {_MASKS}",
        "MaskedSoftmaxAggregation": "visual_dim, dim, *, temperature=1.0, divide_by_count=True, "
        "backend='auto'",
        "MaskedSoftmaxAggregation.forward": "scores, dynamic_mask, visual, *, assume_finite=False",
        "PixelContrastiveLoss": "*, temperature=0.07",
        "PixelContrastiveLoss.forward": "scores, mask, *, grid=None, visual_mask=None",
        "RelevanceCuration": "visual_dim, language_dim, joint_dim=256, *, ratio=0.3, backend='auto'",
        "RelevanceCuration.forward": f"visual, language, *, {_MASKS}",
        "VisualExpression": "tokens, scores, dynamic_mask",
        "VisualExpression.mask": "",
        "VisualExpressionExtractor": "visual_dim, language_dim, dim, *, joint_dim=256, num_heads=8, "
        "mlp_ratio=4.0, ratio=0.3, temperature=1.0, divide_by_count=True, dropout=0.0, norm='pre', "
        "global_cue='first', backend='auto'",
        "VisualExpressionExtractor.forward": f"visual, language, *, {_MASKS}, cue_mask=None",
        "VisualRelationshipSelfAttention": f"dim, *, {_LAYER}",
        "VisualRelationshipSelfAttention.forward": "refined, language_mask=None",
    },
    "metris_blocks.cue": {"Cue": "typing.Literal['first', 'last', 'mean', 'learned']"},
    "metris_blocks.layers": {
        "AttentionLayer": f"dim, context_dim=None, *, {_LAYER}",
        "AttentionLayer.attention_map": "x, context=None, mask=None",
        "AttentionLayer.forward": "x, context=None, mask=None",
        "FeedForward": "dim, *, mlp_ratio=4.0, dropout=0.0",
        "MultiHeadAttention": "dim, context_dim, *, num_heads=8, dropout=0.0, backend='auto'",
        "MultiHeadAttention.attention_map": "x, context, mask=None",
        "MultiHeadAttention.forward": "x, context, mask=None",
        "Norm": "typing.Literal['pre', 'none']",
    },
    "metris_blocks.ops": {
        "absorbed_attention": "query_tokens, visual, mask, query_weight, key_weight, value_weight, *, "
        "num_heads, query_bias=None, value_bias=None, scale=None, assume_finite=False",
        "auto_backend": "query, key, value, mask=None",
        "cosine_relevance": "visual, language, *, backend='auto'",
        "explain_backends": "query, key, value, mask=None",
        "masked_attention": "query, key, value, mask=None, *, scale=None, assume_finite=False, "
        "backend='auto'",
        "masked_softmax_aggregation": "scores, dynamic_mask, visual, *, temperature=1.0, "
        "divide_by_count=True, assume_finite=False, backend='auto'",
        "pixel_contrastive_loss": "scores, target, temperature, *, valid=None, reduction='mean'",
        "top_r_mask": "scores, ratio, *, visual_mask=None, backend='auto'",
    },
    "metris_blocks.ops.absorption": {"absorbs": "l, n, c, o, num_heads"},
    "metris_blocks.ops.backends": {
        "Backend": "typing.Literal['auto', 'eager', 'sdpa', 'xformers', 'triton']",
        "CurationBackend": "typing.Literal['auto', 'eager', 'triton']",
        "check_backend": "op, backend, reasons",
    },
    "metris_blocks.ops.curation": {"check_ratio": "owner, ratio"},
}


def parameters(function):
    """Names, kinds and defaults, as one writes them; without ``self``."""
    words, keyword_only = [], False
    for p in inspect.signature(function).parameters.values():
        if p.name in ("self", "cls"):
            continue
        if p.kind is p.KEYWORD_ONLY and not keyword_only:
            words.append("*")
            keyword_only = True
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        words.append(f"{stars}{p.name}" + ("" if p.default is p.empty else f"={p.default!r}"))
    return ", ".join(words)


def modules():
    """All of the library, found in its folder."""
    for path in sorted(ROOT.rglob("*.py")):
        words = path.relative_to(ROOT.parent).with_suffix("").parts
        name = ".".join(words[:-1] if words[-1] == "__init__" else words)
        if not name.startswith(INTERNAL) and not any(word.startswith("_") for word in name.split(".")):
            yield import_module(name)


def defined(module):
    """What a module defines at its top, and does not merely import."""
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (
                name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)
            )


def described(name, thing):
    """A function by its parameters; a class by those and its own public methods and properties."""
    if not inspect.isclass(thing) and not inspect.isroutine(thing):
        return {name: repr(thing)}
    listed = {name: parameters(thing)}
    for method, member in vars(thing).items() if inspect.isclass(thing) else ():
        if method.startswith("_"):
            continue
        if isinstance(member, property):
            listed[f"{name}.{method}"] = ""
        elif inspect.isfunction(member) or isinstance(member, classmethod | staticmethod):
            listed[f"{name}.{method}"] = parameters(getattr(thing, method))
    return listed


def found():
    """Room -> name -> parameters; what a package lists is not said once more where it is defined."""
    rooms, listed = {}, {id(getattr(m, name)) for m in modules() for name in getattr(m, "__all__", ())}
    for module in modules():
        names = list(getattr(module, "__all__", ()))
        own = [name for name in defined(module) if not name.startswith("_") and name not in names]
        names += [name for name in own if id(getattr(module, name)) not in listed]
        entries = {}
        for name in names:
            entries |= described(name, getattr(module, name))
        if entries:
            rooms[module.__name__] = entries
    return rooms


def test_every_room_with_a_public_name_is_written_down():
    assert found().keys() == PUBLIC.keys()


@pytest.mark.parametrize("room", PUBLIC)
def test_public_interface_is_the_one_written_down(room):
    here, written = found().get(room, {}), PUBLIC[room]
    changes = [f"{name}: gone" for name in written.keys() - here.keys()]
    changes += [f"{name}({here[name]}): new" for name in here.keys() - written.keys()]
    changes += [
        f"{name}({here[name]}): was ({written[name]})"
        for name in here.keys() & written.keys()
        if here[name] != written[name]
    ]
    assert not changes, (
        f"{room} has changed for those who use it:\n  "
        + "\n  ".join(sorted(changes))
        + "\nIf that is meant, write a line in CHANGELOG.md that says so, and change PUBLIC here."
    )


def test_contract_shows_the_extractor_as_it_is():
    contract = " ".join((ROOT.parent / "docs/contract.md").read_text(encoding="utf-8").split())
    name = "VisualExpressionExtractor"
    assert f"{name}({PUBLIC['metris_blocks'][name]})".replace("'", '"') in contract
