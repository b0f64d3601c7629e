"""The public names of the library, with their parameters and defaults: none changes unnoticed."""

import inspect
from importlib import import_module

import pytest

_LAYER = "num_heads=8, mlp_ratio=4.0, dropout=0.0, norm='pre', backend='auto'"
_MASKS = "visual_mask=None, language_mask=None"

PUBLIC = {
    "metris_blocks": {
        "Curation": "scores, dynamic_mask",
        "DynamicMaskCrossAttention": f"dim, visual_dim, *, {_LAYER}",
        "DynamicMaskCrossAttention.forward": "aggregated, visual, dynamic_mask, *, assume_finite=False",
        "GuidanceSet": "tokens, mask",
        "GuidanceSet.join": "*parts",
        "LanguageEnhancer": f"language_dim, visual_dim, *, depth=2, {_LAYER}",
        "LanguageEnhancer.forward": f"language, visual, *, {_MASKS}",
        "MaskedSoftmaxAggregation": "visual_dim, dim, *, temperature=1.0, learn_temperature=False, "
        "divide_by_count=True, backend='auto'",
        "MaskedSoftmaxAggregation.forward": "scores, dynamic_mask, visual, *, gradient_mask=None, "
        "assume_finite=False",
        "PixelContrastiveLoss": "*, temperature=0.07",
        "PixelContrastiveLoss.forward": "scores, mask, *, grid=None, visual_mask=None",
        "RelevanceCuration": "visual_dim, language_dim, joint_dim=256, *, ratio=0.3, backend='auto'",
        "RelevanceCuration.forward": f"visual, language, *, {_MASKS}",
        "VisualExpression": "tokens, scores, dynamic_mask",
        "VisualExpression.mask": "",
        "VisualExpressionExtractor": "visual_dim, language_dim, dim, *, joint_dim=256, num_heads=8, "
        "mlp_ratio=4.0, ratio=0.3, dropout=0.0, norm='pre', temperature=1.0, learn_temperature=False, "
        "straight_through=False, divide_by_count=True, mask_softmax=True, refine=True, relate=True, "
        "global_cue='first', backend='auto'",
        "VisualExpressionExtractor.forward": f"visual, language, *, {_MASKS}, cue_mask=None",
        "VisualRelationshipSelfAttention": f"dim, *, {_LAYER}",
        "VisualRelationshipSelfAttention.forward": "refined, language_mask=None",
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


def found(module):
    """What a module lists, and the public methods and properties that its classes define themselves."""
    listed = {}
    for name in module.__all__:
        thing = getattr(module, name)
        listed[name] = parameters(thing)
        for method, member in vars(thing).items() if inspect.isclass(thing) else ():
            if method.startswith("_"):
                continue
            if isinstance(member, property):
                listed[f"{name}.{method}"] = ""
            elif inspect.isfunction(member) or isinstance(member, classmethod | staticmethod):
                listed[f"{name}.{method}"] = parameters(getattr(thing, method))
    return listed


@pytest.mark.parametrize("room", PUBLIC)
def test_public_interface_is_the_one_written_down(room):
    here, written = found(import_module(room)), PUBLIC[room]
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
