"""Text encoder: BERT's last hidden states, and the tokenizer that goes with it."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from string import ascii_lowercase, digits, punctuation
from typing import Any

from torch import Tensor, nn
from transformers import BertConfig, BertModel, BertTokenizer

from reference_model.files import InputError


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
            try:
                self.bert = BertModel.from_pretrained(source, add_pooling_layer=False)
            except OSError as error:
                raise InputError(_no_weights("text_encoder", source, error)) from error
        else:
            config = BertConfig(vocab_size=vocab_size, **(options or {}))
            self.bert = BertModel(config, add_pooling_layer=False)
        self.dim: int = self.bert.config.hidden_size

    def forward(self, token_ids: Tensor, language_mask: Tensor) -> Tensor:
        """(b, l) ids, (b, l) bool True = real token -> Q_L (b, l, d)."""
        return self.bert(input_ids=token_ids, attention_mask=language_mask.long()).last_hidden_state


def load_tokenizer(source: str | Path) -> BertTokenizer:
    """Load a BERT tokenizer from a folder, or by name through transformers.

    Raises:
        InputError: There is none.
    """
    try:
        return BertTokenizer.from_pretrained(str(source))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(_no_weights("tokenizer", source, error)) from error


def build_tokenizer(sentences: Iterable[str], *, max_words: int = 30000) -> BertTokenizer:
    """Make a WordPiece tokenizer from sentences: their commonest words, and single letters for all others.

    The same sentences give the same ids, whatever their order.
    """
    words = Counter(word for sentence in sentences for word in sentence.lower().split())
    common = sorted(words, key=lambda word: (-words[word], word))[:max_words]
    signs = [*ascii_lowercase, *digits]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces += [*punctuation, *signs, *(f"##{sign}" for sign in signs), *common]
    return BertTokenizer(vocab={piece: i for i, piece in enumerate(dict.fromkeys(pieces))})


def _no_weights(what: str, source: str | Path, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0]
    return f"{what} {source}: cannot be loaded ({reason}); give a local folder, or leave pretrained off"
