"""Text encoder: BERT's last hidden states, and the tokenizer that goes with it."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from string import ascii_lowercase, digits, punctuation
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import BertConfig, BertModel, BertTokenizer

from reference_model.files import InputError

# What a BertConfig writes of itself besides its architecture.
_NOT_OPTIONS = {"architectures", "dtype", "model_type", "torch_dtype", "transformers_version", "vocab_size"}


class TextEncoder(nn.Module):
    """Expression tokens Q_L of a sentence; token 0 is [CLS], the global cue (METRIS 3.1).

    Args:
        name: BERT to fetch where ``pretrained``.
        vocab_size: Entries of the vocabulary, where built from scratch.
        pretrained: Fetch the weights of ``name`` through transformers.
        weights: Local folder of weights, instead of fetching.
        options: Keyword arguments for `transformers.BertConfig`, where built from scratch.

    Raises:
        InputError: The weights cannot be had.
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
        # Without the pooler: nothing reads it, and parameters without gradient break distributed training.
        if pretrained or weights is not None:
            source = name if weights is None else str(weights)
            if weights is not None and not (weights / "config.json").is_file():
                raise InputError(f"text_weights {weights}: is no folder with a config.json of transformers")
            try:
                self.bert = BertModel.from_pretrained(
                    source, add_pooling_layer=False, local_files_only=weights is not None
                )
            except (OSError, ValueError, SafetensorError) as error:
                raise InputError(_no_weights("text_encoder", source, error)) from error
        else:
            known = BertConfig().to_dict()
            for key in options or {}:
                if key not in known:
                    raise InputError(f"text_encoder_options: BertConfig has no {key}; see its documentation")
            config = BertConfig(vocab_size=vocab_size, **(options or {}))
            self.bert = BertModel(config, add_pooling_layer=False)
        self.dim: int = self.bert.config.hidden_size
        self.vocab_size: int = self.bert.config.vocab_size

    @property
    def options(self) -> dict[str, Any]:
        """What builds this encoder again, wherever its weights came from: ``options`` as given above."""
        differing = self.bert.config.to_diff_dict()
        return {key: differing[key] for key in sorted(differing.keys() - _NOT_OPTIONS)}

    def forward(self, token_ids: Tensor, language_mask: Tensor) -> Tensor:
        """(b, l) ids, (b, l) bool True = real token -> Q_L (b, l, d)."""
        return self.bert(input_ids=token_ids, attention_mask=language_mask.long()).last_hidden_state


def load_tokenizer(source: str | Path) -> BertTokenizer:
    """Load a BERT tokenizer from a folder, or by name through transformers.

    Raises:
        InputError: There is none.
    """
    folder = Path(source)
    if isinstance(source, Path) and not folder.is_dir():
        raise InputError(f"tokenizer {source}: no such folder; give the one with vocab.txt or tokenizer.json")
    # Without a vocabulary transformers gives a tokenizer that knows no word and says nothing.
    if folder.is_dir() and not any((folder / name).is_file() for name in ("vocab.txt", "tokenizer.json")):
        raise InputError(f"tokenizer {source}: has neither vocab.txt nor tokenizer.json; copy one there")
    try:
        return BertTokenizer.from_pretrained(str(source), local_files_only=folder.is_dir())
    except Exception as error:
        raise InputError(_no_weights("tokenizer", source, error)) from error


def build_tokenizer(sentences: Iterable[str], *, max_words: int = 30000) -> BertTokenizer:
    """Make a WordPiece tokenizer from sentences: their commonest words, and letters to spell the others with.

    The same sentences give the same ids, whatever their order.
    """
    signs = [*ascii_lowercase, *digits]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces += [*punctuation, *signs, *(f"##{sign}" for sign in signs)]
    spelling = _tokenizer_of(pieces).backend_tokenizer
    words: Counter[str] = Counter()
    for sentence in sentences:
        normal = spelling.normalizer.normalize_str(sentence)
        words.update(word for word, _ in spelling.pre_tokenizer.pre_tokenize_str(normal))
    common = sorted(words, key=lambda word: (-words[word], word))[:max_words]
    return _tokenizer_of([*pieces, *common])


def _tokenizer_of(pieces: list[str]) -> BertTokenizer:
    return BertTokenizer(vocab={piece: i for i, piece in enumerate(dict.fromkeys(pieces))})


def _no_weights(what: str, source: str | Path, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{what} {source}: cannot be loaded ({reason}); give a local folder, or leave pretrained off"
