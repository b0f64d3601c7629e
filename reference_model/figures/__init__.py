"""The paper's figures as functions: arrays in, a matplotlib Figure out; no torch, no model.

Needs matplotlib, and scikit-learn where embeddings are drawn: ``pip install 'metris-blocks[report]'``.
"""

from reference_model.figures.curves import (
    average_precision,
    precision_recall,
    score_by_ratio,
    training_curves,
)
from reference_model.figures.embeddings import Embeddings, embedding_map, positions, silhouette
from reference_model.figures.masks import comparison, marked, tinted
from reference_model.figures.style import COLOURS, COLUMN, PAGE, TRUTH, save
from reference_model.figures.token_maps import (
    attention_sums,
    attention_to_words,
    curated_tokens,
    dimmed,
    heated,
    relevance,
    spread,
)

__all__ = [
    "COLOURS",
    "COLUMN",
    "PAGE",
    "TRUTH",
    "Embeddings",
    "attention_sums",
    "attention_to_words",
    "average_precision",
    "comparison",
    "curated_tokens",
    "dimmed",
    "embedding_map",
    "heated",
    "marked",
    "positions",
    "precision_recall",
    "relevance",
    "save",
    "score_by_ratio",
    "silhouette",
    "spread",
    "tinted",
    "training_curves",
]
