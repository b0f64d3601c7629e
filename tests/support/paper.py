"""METRIS Eq. 1-7 transcribed literally: python loops, float64, no tricks. Slow on purpose.

Written from the paper and docs/contract.md, not from the code. Everything is differentiable, so gradients
can be compared too. A module's parameters arrive as plain tensors by name, as in its ``state_dict``.
"""

import math

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def below(weights: Weights, name: str) -> Weights:
    """The parameters of submodule ``name``, with their names relative to it."""
    return {key[len(name) + 1 :]: value for key, value in weights.items() if key.startswith(name + ".")}


# --------------------------------------------------------------------------- Eq. 1: X = φ(F_v), Y = φ(Q̂_L)


def linear(tokens: Tensor, weights: Weights) -> Tensor:
    """(b, s, c) -> (b, s, o): ``W x + b`` for each token."""
    weight, bias = weights["weight"].double(), weights.get("bias")
    rows = [
        torch.stack([weight @ token.double() + (0 if bias is None else bias.double()) for token in sample])
        for sample in tokens
    ]
    return torch.stack(rows)


# ------------------------------------------------------------------- Eq. 2: S_c = C(X, Y), E = R(S_c, r)


def eq2_relevance(visual: Tensor, language: Tensor) -> Tensor:
    """(b, n, j), (b, l, j) -> (b, l, n): cosine of every pair; 0 where a vector is zero."""
    b, n, l = visual.shape[0], visual.shape[1], language.shape[1]
    samples = []
    for i in range(b):
        rows = []
        for j in range(l):
            y = language[i, j].double()
            row = []
            for k in range(n):
                x = visual[i, k].double()
                length = (x @ x).sqrt() * (y @ y).sqrt()
                row.append((x @ y) / length if length > 0 else torch.zeros((), dtype=torch.float64))
            rows.append(torch.stack(row))
        samples.append(torch.stack(rows))
    return torch.stack(samples)


def number_curated(n_valid: int, ratio: float) -> int:
    """N_p: the share ``ratio`` of the tokens, halves rounded up, at least one while there is one."""
    return 0 if n_valid == 0 else max(1, math.floor(ratio * n_valid + 0.5))


def eq2_curate(scores: Tensor, ratio: float, visual_mask: Tensor | None = None) -> list[list[list[int]]]:
    """(b, l, n) -> E[sample][word]: the most relevant real tokens; among equals the lowest index first."""
    b, l, n = scores.shape
    curated = []
    for i in range(b):
        real = [k for k in range(n) if visual_mask is None or bool(visual_mask[i, k])]
        rows = []
        for j in range(l):
            row = scores[i, j].tolist()
            ranked = sorted(real, key=lambda k: (-row[k], k))
            rows.append(ranked[: number_curated(len(real), ratio)])
        curated.append(rows)
    return curated


# --------------------------------------------------------------------- Eq. 3: M = 0 in E, -inf outside of E


def eq3_dynamic_mask(curated: list[list[list[int]]], n: int) -> Tensor:
    """E -> (b, l, n) bool: True where the paper's M is 0, False where it is -inf."""
    mask = torch.zeros(len(curated), len(curated[0]), n, dtype=torch.bool)
    for i, rows in enumerate(curated):
        for j, indices in enumerate(rows):
            for k in indices:
                mask[i, j, k] = True
    return mask


# ------------------------------------ Eq. 4: -log σ(s/τ) on relevant pixels, -log(1 - σ(s/τ)) elsewhere


def eq4_pixel_losses(scores: Tensor, target: Tensor, temperature: Tensor | float) -> Tensor:
    """(b, n) -> (b, n): each cell weighs the two cases of Eq. 4 by the share of its area in the target."""
    b, n = scores.shape
    rows = []
    for i in range(b):
        row = []
        for k in range(n):
            sigma = 1 / (1 + torch.exp(-scores[i, k].double() / temperature))
            share = float(target[i, k])
            row.append(share * -torch.log(sigma) + (1 - share) * -torch.log(1 - sigma))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def eq4_contrastive(
    scores: Tensor, target: Tensor, temperature: Tensor | float, valid: Tensor | None = None
) -> Tensor:
    """Mean of Eq. 4 over the cells that count; 0 if none does."""
    losses = eq4_pixel_losses(scores, target, temperature)
    counted = [losses[i, k] for i, k in places(losses) if valid is None or bool(valid[i, k])]
    return torch.stack(counted).mean() if counted else torch.zeros((), dtype=torch.float64)


def area_average(mask: Tensor, rows: int, columns: int) -> Tensor:
    """(b, h, w) -> (b, rows · columns): mean of the pixels that each cell touches, row-major."""
    b, h, w = mask.shape
    out = torch.zeros(b, rows * columns, dtype=torch.float64)
    for i in range(b):
        for r in range(rows):
            for c in range(columns):
                ys = range(r * h // rows, -(-(r + 1) * h // rows))
                xs = range(c * w // columns, -(-(c + 1) * w // columns))
                total = sum(float(mask[i, y, x]) for y in ys for x in xs)
                out[i, r * columns + c] = total / (len(ys) * len(xs))
    return out


def places(tensor: Tensor) -> list[tuple[int, int]]:
    """All index pairs of the first two axes."""
    return [(i, j) for i in range(tensor.shape[0]) for j in range(tensor.shape[1])]


# ----------------------------------------------- Eq. 5: F_a = 1/N_p Σ softmax(S_c + M) ⊙ Repeat(F_v, L)


def softmax_over(logits: Tensor, curated: list[int]) -> dict[int, Tensor]:
    """``softmax(logits + M)`` at the places where M is 0; elsewhere it is 0 and left out."""
    if not curated:
        return {}
    highest = max(logits[k].item() for k in curated)
    powers = {k: torch.exp(logits[k] - highest) for k in curated}
    total = sum(powers.values())
    return {k: power / total for k, power in powers.items()}


def eq5_aggregate(
    scores: Tensor,
    dynamic_mask: Tensor,
    visual: Tensor,
    *,
    temperature: float = 1.0,
    divide_by_count: bool = True,
) -> Tensor:
    """(b, l, n), (b, l, n) bool, (b, n, c) -> (b, l, c); zero where nothing is curated."""
    b, l, _ = scores.shape
    samples = []
    for i in range(b):
        rows = []
        for j in range(l):
            curated = dynamic_mask[i, j].nonzero().flatten().tolist()
            row = torch.zeros(visual.shape[-1], dtype=torch.float64)
            for k, weight in softmax_over(scores[i, j].double() / temperature, curated).items():
                row = row + weight * visual[i, k].double() / (len(curated) if divide_by_count else 1)
            rows.append(row)
        samples.append(torch.stack(rows))
    return torch.stack(samples)


# ------------------------------------------------------------ Eq. 6-7: attention, MLP, and both in a layer


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """(b, l, heads, e), (b, n, heads, e), (b, n, heads, e), (b, l, n) or (b, n) bool -> (b, l, heads, e)."""
    b, l, heads, e = query.shape
    n = key.shape[1]
    scale = 1 / math.sqrt(e) if scale is None else scale
    samples = []
    for i in range(b):
        rows = []
        for j in range(l):
            allowed = torch.ones(n) if mask is None else mask[i] if mask.ndim == 2 else mask[i, j]
            curated = allowed.nonzero().flatten().tolist()
            row = []
            for h in range(heads):
                logits = (key[i, :, h].double() @ query[i, j, h].double()) * scale
                out = torch.zeros(e, dtype=torch.float64)
                for k, weight in softmax_over(logits, curated).items():
                    out = out + weight * value[i, k, h].double()
                row.append(out)
            rows.append(torch.stack(row))
        samples.append(torch.stack(rows))
    return torch.stack(samples)


def multi_head_attention(
    x: Tensor, context: Tensor, mask: Tensor | None, weights: Weights, num_heads: int
) -> Tensor:
    """(b, l, d), (b, n, c), mask -> (b, l, d)."""
    split = lambda tokens: tokens.unflatten(-1, (num_heads, -1))
    query = split(linear(x, below(weights, "q_proj")))
    key = split(linear(context, below(weights, "k_proj")))
    value = split(linear(context, below(weights, "v_proj")))
    return linear(attention(query, key, value, mask).flatten(2), below(weights, "out_proj"))


def layer_norm(tokens: Tensor, weights: Weights) -> Tensor:
    """Normalise each token over its channels; without weights (norm "none"), leave it."""
    if not weights:
        return tokens
    centred = tokens - tokens.mean(dim=-1, keepdim=True)
    deviation = (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    return centred / deviation * weights["weight"].double() + weights["bias"].double()


def mlp(tokens: Tensor, weights: Weights) -> Tensor:
    """Linear, GELU, linear."""
    hidden = linear(tokens, below(weights, "0"))
    return linear(hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2, below(weights, "2"))


def attention_layer(
    x: Tensor, context: Tensor | None, mask: Tensor | None, weights: Weights, num_heads: int
) -> Tensor:
    """``x̂ = MHA(x, context, mask) + x; MLP(x̂) + x̂``: Eq. 6 with a context, Eq. 7 without."""
    x = x.double()
    asking = layer_norm(x, below(weights, "attention_norm"))
    attended = asking if context is None else context
    x = multi_head_attention(asking, attended, mask, below(weights, "attention"), num_heads) + x
    return mlp(layer_norm(x, below(weights, "mlp_norm")), below(weights, "mlp")) + x


# ----------------------------------------------------------------- 3.2 as a whole, from a module's state_dict


def without_padding(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Put zeros in the rows that are not real."""
    if mask is None:
        return tokens
    return torch.stack(
        [
            torch.stack(
                [
                    row if bool(real) else torch.zeros_like(row)
                    for row, real in zip(sample, reals, strict=True)
                ]
            )
            for sample, reals in zip(tokens, mask, strict=True)
        ]
    )


def enhance(
    language: Tensor,
    visual: Tensor,
    weights: Weights,
    num_heads: int,
    *,
    visual_mask: Tensor | None = None,
    language_mask: Tensor | None = None,
) -> Tensor:
    """Q_L, F_v -> Q̂_L: cross-attention layers, language asks vision."""
    language = without_padding(language, language_mask)
    visual = without_padding(visual, visual_mask)
    depth = len({name.split(".")[1] for name in weights})
    for i in range(depth):
        language = attention_layer(language, visual, visual_mask, below(weights, f"layers.{i}"), num_heads)
    return without_padding(language, language_mask)


def curate(
    visual: Tensor,
    language: Tensor,
    weights: Weights,
    ratio: float,
    *,
    visual_mask: Tensor | None = None,
    language_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Eq. 1-3: S_c with zeros, and M with False, wherever a word or a visual token is padding."""
    x = linear(without_padding(visual, visual_mask), below(weights, "visual_proj"))
    y = linear(without_padding(language, language_mask), below(weights, "language_proj"))
    scores = eq2_relevance(x, y)
    mask = eq3_dynamic_mask(eq2_curate(scores, ratio, visual_mask), scores.shape[-1])
    scores, mask = without_padding(scores, language_mask), without_padding(mask, language_mask)
    return without_padding(scores.mT, visual_mask).mT, mask


def extract(
    visual: Tensor,
    language: Tensor,
    weights: Weights,
    *,
    num_heads: int,
    ratio: float,
    temperature: float = 1.0,
    divide_by_count: bool = True,
    mask_softmax: bool = True,
    refine: bool = True,
    relate: bool = True,
    visual_mask: Tensor | None = None,
    language_mask: Tensor | None = None,
    cue_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """F_v, Q̂_L -> Q̂_V, S_c, M: the visual expression extractor, or a variant of Tables 6, 8b and 9."""
    masks = {"visual_mask": visual_mask, "language_mask": language_mask}
    scores, mask = curate(visual, language, below(weights, "curation"), ratio, **masks)
    visual = without_padding(visual, visual_mask)
    cues = torch.ones(scores.shape[:2], dtype=torch.bool)
    for given in (language_mask, cue_mask):
        cues = cues if given is None else cues & given
    mask = without_padding(mask, cues)
    seen = mask
    if not mask_softmax:
        # Every real visual token, for each cue.
        real = torch.ones(visual.shape[:2], dtype=torch.bool) if visual_mask is None else visual_mask
        seen = without_padding(real[:, None].expand_as(mask), cues)
    tokens = eq5_aggregate(scores, seen, visual, temperature=temperature, divide_by_count=divide_by_count)
    tokens = linear(tokens, below(weights, "aggregation.proj"))
    if refine:
        tokens = attention_layer(tokens, visual, mask, below(weights, "refinement.layer"), num_heads)
    if relate:
        tokens = without_padding(tokens, cues)
        tokens = attention_layer(tokens, None, cues, below(weights, "relationship.layer"), num_heads)
    return without_padding(tokens, cues), scores, mask
