"""Attention building blocks of METRIS, listed in the order the data meets them."""

from metris_blocks.aggregation import MaskedSoftmaxAggregation
from metris_blocks.contrastive import PixelContrastiveLoss
from metris_blocks.cue import GlobalCue
from metris_blocks.curation import Curation, RelevanceCuration
from metris_blocks.enhancement import LanguageEnhancer
from metris_blocks.extractor import VisualExpression, VisualExpressionExtractor
from metris_blocks.guidance import GuidanceSet
from metris_blocks.refinement import DynamicMaskCrossAttention
from metris_blocks.relationship import VisualRelationshipSelfAttention

__all__ = [
    "Curation",
    "DynamicMaskCrossAttention",
    "GlobalCue",
    "GuidanceSet",
    "LanguageEnhancer",
    "MaskedSoftmaxAggregation",
    "PixelContrastiveLoss",
    "RelevanceCuration",
    "VisualExpression",
    "VisualExpressionExtractor",
    "VisualRelationshipSelfAttention",
]
__version__ = "0.1.0"
