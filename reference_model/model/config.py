"""Every choice of the network; the defaults are the paper's setting, or say where it is silent."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

GuidanceName = Literal["pure_le", "enhanced_le", "ve", "enhanced_le+pixels", "enhanced_le+ve"]


@dataclass(frozen=True)
class ModelConfig:
    """The network. Defaults: METRIS with Swin-B and BERT-base at 480 px."""

    image_encoder: str = "swin_base_patch4_window12_384.ms_in22k"
    """Any timm model with feature maps, by name; or transformers' Swin, as transformers/NAME, such as
    transformers/microsoft/swin-base-patch4-window12-384-in22k."""
    image_encoder_options: dict[str, Any] = field(default_factory=lambda: {"drop_path_rate": 0.3})
    """Keyword arguments for timm's constructor, or transformers' SwinConfig. Drop path 0.3 is LAVT's; the
    paper is silent. With window_size 15 instead of 12, no window is padded at 480 px."""
    image_size: int = 480
    """Side of the square that images are resized to, in pixels."""
    coordinates: bool = False
    """Add a learned map of position to each feature map, akin to CRIS's CoordConv; the paper names none."""
    text_encoder: str = "bert-base-uncased"
    """A text encoder by transformers' name: BERT and its kin, CLIP's, T5's, or a decoder-only language model;
    read only where pretrained asks for it."""
    text_encoder_options: dict[str, Any] = field(default_factory=dict)
    """From scratch: keyword arguments for transformers' BertConfig, whose defaults are BERT-base; or a
    model_type such as roberta, clip_text_model, t5 or gpt2, and keyword arguments for its config."""
    vocab_size: int = 30522
    """Entries of the tokenizer's vocabulary; training from scratch sets it to the vocabulary it builds."""
    max_tokens: int = 20
    """Longest sentence in tokens, special ones as [CLS] and [SEP] included; the peers' value, the paper is
    silent."""
    pretrained: bool = False
    """Fetch both encoders' weights through timm and transformers (needs a network or their cache)."""
    image_weights: Path | None = None
    """Local weights for the image encoder, instead of fetching: a file of timm's, a folder of transformers',
    or for either Swin a .pth file of the original Swin Transformer."""
    text_weights: Path | None = None
    """Local folder of transformers weights and vocabulary for the text encoder, instead of fetching."""
    guidance_dim: int = 768
    """d, channels of the guidance tokens."""
    joint_dim: int = 256
    """Channels of the joint space of Eq. 1; the paper is silent."""
    enhancer_depth: int = 2
    """Cross-attention layers before curation; the paper says "layers"."""
    num_heads: int = 8
    """Heads of every attention outside the encoders; the paper is silent."""
    mlp_ratio: float = 4.0
    """Hidden channels per channel in every MLP outside the encoders; the paper is silent."""
    guidance: GuidanceName = "enhanced_le+ve"
    """What guides the decoder (Table 5): linguistic (le) and visual (ve) expression tokens, or pixels."""
    match_size: bool = False
    """Give a variant below as many more attention layers as bring it to the size of the whole model."""
    refine: bool = True
    """Step 2 of the extractor, Eq. 6 (Table 6a). Without step 1: ratio 1."""
    relate: bool = True
    """Step 3 of the extractor, Eq. 7 (Table 6a)."""
    cues: Literal["all", "global", "local"] = "all"
    """Expression tokens that get a visual expression token (Table 6b)."""
    mask_softmax: bool = True
    """The softmax of Eq. 5 sees curated tokens only (Table 8b)."""
    articles: bool = True
    """The words a, an and the get a visual expression token too (Table 9)."""
    article_ids: list[int] = field(default_factory=list)
    """Ids of those words; training sets them from its tokenizer."""
    no_target: bool = False
    """Classify sentences that name nothing in the image, as in gRefCOCO; their mask is predicted empty."""
    ratio: float = 0.3
    """r, share of visual tokens curated per expression token, in (0, 1]; the paper's 30 per cent."""
    dropout: float = 0.0
    """Probability of zeroing a channel in every block outside the encoders, in [0, 1)."""
    norm: Literal["pre", "none"] = "pre"
    """Where blocks normalise: before attention and MLP, or nowhere (Eq. 6 and 7 to the letter)."""
    aggregation_temperature: float = 1.0
    """Divides the scores in the softmax of Eq. 5, > 0; 1 is the paper's."""
    divide_by_count: bool = True
    """Keep the 1/N_p of Eq. 5."""
    decoder_dim: int | list[int] = 768
    """Channels of the mask decoder, one number or one a stage, coarse to fine; 768 fits the paper's 432
    GMACs, which does not print it."""
    backend: Literal["auto", "eager", "sdpa", "xformers", "triton"] = "auto"
    """Kernel of every masked attention."""


def preset(name: str, **changes: Any) -> ModelConfig:
    """Give the network of a preset: metris_swin_b, metris_swin_b_lite, metris_paper, metris_tiny.

    Args:
        name: Of a file in ``reference_model/presets``.
        changes: Fields of `ModelConfig` that shall have other values, such as ``ratio=0.5``.

    Raises:
        InputError: There is no preset or no field of this name, or a value has the wrong type.
    """
    # Building and timing the network needs no parser of YAML and command lines.
    from reference_model.configs import build, preset_file, read_yaml, refuse_unknown

    source = f"preset {name}"
    values = read_yaml(preset_file(name), ModelConfig, section="model")
    for key in changes.keys() - {one.name for one in fields(ModelConfig)}:
        refuse_unknown(source, key, ModelConfig)
    return build(ModelConfig, values | changes, source=source)


@dataclass(frozen=True)
class ProfileConfig:
    """Print parameters, GMACs, latency and peak memory of the model, part by part.

    Needs neither data nor a network: model.pretrained is set aside, and the weights are random unless
    local files are given.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    image_size: int | None = None
    """Side of the square images in pixels. None: model.image_size."""
    tokens: int | None = None
    """Tokens of each sentence, none of them padding, in [3, 512]. None: model.max_tokens."""
    batch_size: int = 1
    """Images of a forward pass, with one sentence each, in [1, 1024]."""
    sentences: int = 5
    """Sentences about one image, for the cost of encoding it once, in [1, 1024]."""
    rounds: int = 5
    """Timed rounds, of which the median is given; each runs every part once, in turn. One more warms up."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a GPU where there is one."""
    threads: int | None = None
    """Threads on the CPU, in [1, 1024]. None: torch's choice."""
    json: bool = False
    """Print one JSON object instead of tables."""
