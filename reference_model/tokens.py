"""Sentences to token ids: tokenizers loaded or built, and what opens and closes a sentence."""

import json
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import ascii_lowercase, digits, punctuation
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from reference_model.files import InputError, one_line, shown

if TYPE_CHECKING:
    from transformers import BertTokenizer, PreTrainedTokenizerBase


class Tokens(NamedTuple):
    """Tokenised sentences."""

    token_ids: Tensor
    """(b, l) int64; index 0 is [CLS] or what stands for it, padding at the end."""

    language_mask: Tensor
    """(b, l) bool; True = real token, [CLS] and [SEP] or what stands for them included."""


def report_overlong(
    tokenizer: "PreTrainedTokenizerBase", expressions: Sequence[str], max_tokens: int
) -> None:
    """Say on stderr, once before a run, how many sentences :class:`Collate` will cut."""
    rows = _framed(tokenizer, expressions)
    overlong = sum(len(row.ids) > max_tokens for row in rows)
    if overlong:
        print(f"{overlong} of {len(rows)} sentences exceed {max_tokens} tokens and are cut", file=sys.stderr)


def tokenize(
    tokenizer: "PreTrainedTokenizerBase",
    expressions: Sequence[str],
    max_tokens: int = 20,
    *,
    warn: bool = True,
) -> Tokens:
    """Tokenise sentences and pad them to the longest one.

    Args:
        tokenizer: That of the text encoder. Where it opens no sentence, as T5's and GPT's, its sign for a
            beginning, else for an end, is put in front: place 0 is the global cue's in every sentence.
        expressions: b sentences.
        max_tokens: The most tokens of a sentence, special ones included. A longer sentence is cut; its last
            token stays the closing one ([SEP]), if it has one.
        warn: Name each sentence that is cut in a warning.

    Returns:
        (b, l) int64 token ids and (b, l) bool mask, l at most ``max_tokens``.

    Raises:
        InputError: A sentence has no word.
        ValueError: ``max_tokens`` leaves no room for a word, or there is no sentence.
    """
    if isinstance(expressions, str):
        raise TypeError("tokenize: expressions is one string, expected a list of them")
    if not expressions:
        raise ValueError("tokenize: expressions is empty, expected at least one")
    for expression in expressions:
        if not expression.strip():
            raise InputError(f"{shown(expression)}: has no word; write what to look for")
        try:
            expression.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{shown(expression)}: not valid Unicode text; mend that sentence") from error
    rows = []
    for expression, (ids, closed) in zip(expressions, _framed(tokenizer, expressions)):
        special = 1 + closed
        if max_tokens <= special:
            raise ValueError(
                f"tokenize: max_tokens is {max_tokens}, but {special} of them are special tokens"
            )
        if len(ids) <= special:
            raise InputError(f"{shown(expression)}: has no word; write what to look for")
        if len(ids) > max_tokens:
            if warn:
                warnings.warn(
                    f"{expression!r} has {len(ids)} tokens with the special ones, {max_tokens} are kept",
                    stacklevel=2,
                )
            ids = [*ids[: max_tokens - closed], *ids[len(ids) - closed :]]
        rows.append(ids)
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    return Tokens(
        # What stands there is not read; GPT's tokenizer has no sign for it.
        torch.tensor([row + [tokenizer.pad_token_id or 0] * (longest - len(row)) for row in rows]),
        torch.arange(longest) < lengths[:, None],
    )


class _Framed(NamedTuple):
    ids: list[int]
    """Token 0 opens the sentence."""
    closed: bool
    """Whether the last one closes it."""


def _framed(tokenizer: "PreTrainedTokenizerBase", expressions: Sequence[str]) -> list[_Framed]:
    """Tokenise sentences, each behind a token that opens it."""
    signs = (tokenizer.cls_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    opening = next((sign for sign in signs if sign is not None), None)
    if opening is None:
        raise ValueError("tokenize: the tokenizer has no sign for the beginning or the end of a sentence")
    rows = tokenizer(list(expressions), return_special_tokens_mask=True, verbose=False)
    return [
        _Framed(ids if added[:1] == [1] else [opening, *ids], len(ids) > 1 and added[-1] == 1)
        for ids, added in zip(rows["input_ids"], rows["special_tokens_mask"])
    ]


# Any of these holds one, the last in sentencepiece's form.
_VOCABULARIES = ("vocab.txt", "tokenizer.json", "spiece.model")


def load_tokenizer(source: str | Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a text encoder from a folder, or by name through transformers.

    A folder that does not say whose it is is CLIP's with vocab.json and merges.txt, else BERT's.

    Raises:
        InputError: There is none, or none that fits a text encoder.
    """
    folder = Path(source)
    if isinstance(source, Path) and not folder.is_dir():
        raise InputError(f"tokenizer {source}: no such folder; give the one with vocab.txt or tokenizer.json")
    from transformers import AutoTokenizer, BertTokenizer, CLIPTokenizer  # takes seconds

    kind: Any = AutoTokenizer
    if folder.is_dir():
        # Without a vocabulary transformers gives a tokenizer that knows no word and says nothing.
        clip = all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))
        said = _json(folder / "tokenizer_config.json").get("tokenizer_class")
        # ByT5's knows the bytes, and has no file for them.
        files = clip or said == "ByT5Tokenizer" or any((folder / name).is_file() for name in _VOCABULARIES)
        if not files:
            raise InputError(
                f"tokenizer {source}: has neither {' nor '.join(_VOCABULARIES)}, nor vocab.json with "
                "merges.txt; copy one there"
            )
        if not (said or _json(folder / "config.json").get("model_type")):
            kind = CLIPTokenizer if clip else BertTokenizer
    try:
        # Never code that came with a tokenizer, nor a question whether to run it.
        options = {"local_files_only": folder.is_dir(), "trust_remote_code": False}
        tokenizer = kind.from_pretrained(str(source), **options)
    except Exception as error:
        raise InputError(_no_weights("tokenizer", source, error)) from error
    problem = ""
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        problem = "knows no word"
    elif not (tokenizer.cls_token or tokenizer.bos_token or tokenizer.eos_token):
        problem = "has no token that opens or closes a sentence"
    if problem:
        raise InputError(f"tokenizer {source}: {problem}; give the one that came with the text encoder")
    return tokenizer


def article_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Give the ids of the words a, an and the, as far as the vocabulary has them whole."""
    ids: list[int] = []
    for word in ("a", "an", "the"):
        # Byte-level vocabularies such as RoBERTa's have another entry for a word behind a space.
        for text in (word, f" {word}"):
            pieces = tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(pieces) == 1 and pieces[0] not in (tokenizer.unk_token_id, *ids):
                ids += pieces
    return ids


def build_tokenizer(sentences: Iterable[str], *, max_words: int = 30000) -> "BertTokenizer":
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


def _tokenizer_of(pieces: list[str]) -> "BertTokenizer":
    from transformers import BertTokenizer

    return BertTokenizer(vocab={piece: i for i, piece in enumerate(dict.fromkeys(pieces))})


def _json(path: Path) -> dict[str, Any]:
    """Read a JSON object; {} where there is none: whoever needs it will say so."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _no_weights(what: str, source: str | Path, error: Exception) -> str:
    return (
        f"{what} {source}: cannot be loaded ({one_line(error)}); give a local folder, or leave pretrained off"
    )
