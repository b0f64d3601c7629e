"""Text encoder: last hidden states of BERT, CLIP's text tower, T5, GPT and their kin, and the tokenizer."""

import inspect
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from reference_model.files import InputError, one_line
from reference_model.tokens import _no_weights

# Encoders without a causal mask whose tokenizers put nothing before a sentence.
_T5 = {"t5", "mt5", "umt5"}
# What a config writes of itself besides its architecture.
_NOT_OPTIONS = {"architectures", "dtype", "model_type", "torch_dtype", "transformers_version", "vocab_size"}


class Expression(NamedTuple):
    """What `TextEncoder` returns."""

    tokens: Tensor
    """Q_L, (b, l, d); token 0 is the global cue, the others are the sentence's, where its mask says so."""
    cue: Tensor
    """(b, d), the global cue."""
    mask: Tensor
    """(b, l) bool; True = real token, as it was given."""


class TextEncoder(nn.Module):
    """Expression tokens Q_L of a sentence; token 0 is the global cue (METRIS 3.1).

    For BERT and its kin, trained to fill gaps, that is the state of [CLS]. No other opens a sentence with a
    token that says something: there the state of the last real token takes its place (CLIP's first EOS, T5's
    EOS, the last word of a language model). Causal ones read the opening token before it is replaced; T5 and
    its kin, which know none, do not.

    Args:
        name: Text encoder to fetch where ``pretrained``.
        vocab_size: Entries of the vocabulary, where built from scratch.
        pretrained: Fetch the weights of ``name`` through transformers.
        weights: Local folder of weights, instead of fetching.
        options: Where built from scratch, ``model_type`` ("bert" if left out, "roberta", "clip_text_model",
            "t5", "gpt2", ...) and keyword arguments for the config that transformers has for it.

    Raises:
        InputError: The weights cannot be had, or the model or an option is unknown.
    """

    def __init__(
        self,
        name: str,
        *,
        vocab_size: int,
        pretrained: bool = False,
        weights: Path | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        # Called so whatever it is: the name is in the checkpoints.
        if pretrained or weights is not None:
            self.bert = _fetched(name, weights)
        else:
            self.bert = _from_scratch(vocab_size, options or {})
        # OPT's smallest gives narrower states than it computes with.
        self.dim: int = getattr(self.bert.config, "word_embed_proj_dim", self.bert.config.hidden_size)
        self.vocab_size: int = self.bert.config.vocab_size
        self.fills_gaps: bool = _fills_gaps(self.bert.config)

    @property
    def options(self) -> dict[str, Any]:
        """What builds this encoder again, wherever its weights came from: ``options`` as given above."""
        config = self.bert.config
        kind = {} if config.model_type == "bert" else {"model_type": config.model_type}
        differing = config.to_diff_dict()
        # Published configs hold keys of older days, which mean nothing to the class.
        known = type(config)().to_dict().keys()
        return kind | {key: differing[key] for key in sorted((differing.keys() & known) - _NOT_OPTIONS)}

    @property
    def longest(self) -> int | None:
        """The most tokens of a sentence that it has places for; None where places are relative."""
        # RoBERTa and its like count their places from behind that of padding.
        padding = getattr(getattr(self.bert, "embeddings", None), "position_embeddings", None)
        padding = getattr(padding, "padding_idx", None)
        places = getattr(self.bert.config, "max_position_embeddings", -1)  # -1 is XLNet's word for no limit
        return None if places < 0 else places - (0 if padding is None else padding + 1)

    def forward(self, token_ids: Tensor, language_mask: Tensor) -> Expression:
        """(b, l) ids, (b, l) bool True = real token -> Q_L (b, l, d) and its global cue.

        Raises:
            InputError: A sentence has more tokens than the encoder has places for.
        """
        length = token_ids.shape[1]
        if self.longest is not None and length > self.longest:
            raise InputError(
                f"text_encoder: a sentence has {length} tokens, but it has places for {self.longest}; lower "
                "max_tokens"
            )
        place = torch.arange(length, device=token_ids.device)
        heard = language_mask & (place > 0) if self.bert.config.model_type in _T5 else language_mask
        states = self.bert(input_ids=token_ids, attention_mask=heard.long()).last_hidden_state
        if not self.fills_gaps:
            # The mask says where the sentence closes; ids would not, as CLIP pads with the same EOS.
            last = (language_mask * place).amax(dim=1)
            # gather, as take_along_dim would tie an exported program to the sizes it was traced with.
            closing = states.gather(1, last[:, None, None].expand(-1, 1, states.shape[-1]))
            states = torch.cat([closing, states[:, 1:]], dim=1)
        return Expression(states, states[:, 0], language_mask)


def _fetched(name: str, folder: Path | None) -> PreTrainedModel:
    source = name if folder is None else str(folder)
    if folder is not None and not (folder / "config.json").is_file():
        raise InputError(f"text_weights {folder}: is no folder with a config.json of transformers")
    local = folder is not None
    try:
        # CLIP's own config holds that of its text tower.
        config = AutoConfig.from_pretrained(source, local_files_only=local).get_text_config()
        kind, without_pooler = _model_class(config, source)
        model, report = kind.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            local_files_only=local,
            output_loading_info=True,
            **without_pooler,
        )
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise InputError(_no_weights("text_encoder", source, error)) from error
    if missing := sorted(report["missing_keys"]):
        count = f"{len(missing)} weights, first {missing[0]}"
        raise InputError(f"text_encoder {source}: lacks {count}; give weights of a {config.model_type}")
    return _stack(model)


def _from_scratch(vocab_size: int, options: dict[str, Any]) -> PreTrainedModel:
    options = dict(options)
    model_type = options.pop("model_type", "bert")
    if model_type not in CONFIG_MAPPING:
        step = "bert, roberta, clip_text_model, t5 and gpt2 are some"
        raise InputError(f"text_encoder_options: transformers has no model_type {model_type}; {step}")
    config_class = CONFIG_MAPPING[model_type]
    known = config_class().to_dict()
    for key in options:
        if key not in known:
            raise InputError(
                f"text_encoder_options: {config_class.__name__} has no {key}; see its documentation"
            )
    # A config's own are entries of its own vocabulary. Nothing here reads them.
    special = ((key, known.get(key)) for key in ("bos_token_id", "eos_token_id", "pad_token_id"))
    outside = {key: 0 for key, value in special if isinstance(value, int) and value >= vocab_size}
    try:
        config = config_class(vocab_size=vocab_size, **outside | options)
    except StrictDataclassError as error:
        raise InputError(f"text_encoder_options: {' '.join(str(error).split())}") from error
    kind, without_pooler = _model_class(config, model_type)
    try:
        return _stack(kind(config, **without_pooler))
    except (ValueError, ZeroDivisionError) as error:  # so transformers refuses heads that do not fit
        raise InputError(f"text_encoder_options: {one_line(error)}") from error


def _fills_gaps(config: PreTrainedConfig) -> bool:
    """Whether a model was trained as BERT was, so that its first token has heard the sentence."""
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not config.is_encoder_decoder


def _model_class(config: PreTrainedConfig, source: str) -> tuple[type[PreTrainedModel], dict[str, bool]]:
    """Give the class of a text encoder, and what leaves its pooler out."""
    if config.model_type in _T5:
        return MODEL_FOR_TEXT_ENCODING_MAPPING[type(config)], {}
    causal = config.model_type == "clip_text_model" or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    sees = hasattr(config, "vision_config") or config.get_text_config() is not config
    sound = (causal or _fills_gaps(config)) and not (sees or config.is_encoder_decoder)
    if not sound or type(config) not in MODEL_MAPPING:
        raise InputError(
            f"text_encoder {source}: {config.model_type} gives no global cue that is known here; take BERT "
            "or its kin (trained to fill gaps), CLIP's text encoder, T5, or a decoder-only language model"
        )
    kind = MODEL_MAPPING[type(config)]
    # Nothing reads the pooler, and parameters without gradient break distributed training.
    has_pooler = "add_pooling_layer" in inspect.signature(kind).parameters
    return kind, {"add_pooling_layer": False} if has_pooler else {}


def _stack(model: PreTrainedModel) -> PreTrainedModel:
    """Give what turns token ids into states, and keeps nothing of a sentence for the next."""
    if model.config.model_type in _T5:
        # Its embedding hangs in two places, and files of weights hold each tensor once.
        model = model.encoder
    if not _fills_gaps(model.config):
        model.config.use_cache = False
    return model
