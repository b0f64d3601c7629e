"""What every reader offers, whatever the layout: splits of records."""

import difflib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn

from reference_model.data.images import Folders
from reference_model.data.records import Record
from reference_model.data.splits import part_of, seen_and_unseen
from reference_model.data.untrusted import MEND, plain_field
from reference_model.files import InputError, shown

OnError = Literal["stop", "skip"]
Text = Literal["sent", "raw"]

LONGEST_SENTENCE = 10_000  # characters
LONGEST_NAME = 64  # of a split, characters


class Split:
    """The sentences of one split, to go through as often as needed.

    Args:
        reader: Of the data set.
        name: Of the split, or of a part of one by seen and unseen classes.
    """

    listed: list[Record] | None
    """All of them, in file order; None where the layout only streams them."""

    def __init__(self, reader: "Reader", name: str) -> None:
        self.reader, self.name = reader, name
        self.listed = None if reader.streamed else reader.records(name)

    def __iter__(self) -> Iterator[Record]:
        return self.reader.stream(self.name) if self.listed is None else iter(self.listed)

    @property
    def count(self) -> int | None:
        """Count of sentences; of a streamed split what the index says, None where it does not."""
        return self.reader.splits.get(self.name) if self.listed is None else len(self.listed)

    def refuse_empty(self, why: str) -> None:
        """Refuse a split without a sentence; of a stream this finds wrong names before long work.

        Raises:
            InputError: There is none.
        """
        if next(iter(self), None) is None:
            raise InputError(f"{self.reader.source}", f"split {self.name!r} has no sentence", why)


def as_list(records: Iterable[Record]) -> Sequence[Record] | None:
    """Give records as a list where they are one, and None where they are streamed."""
    records = records.listed if isinstance(records, Split) else records
    return records if isinstance(records, Sequence) else None


class Reader(ABC):
    """A data set whose records are asked for split by split.

    Beside its own splits it has the parts by seen and unseen classes that open-vocabulary work uses:
    ``train_seen``, ``val_unseen``, ``test_unseen`` (of all splits whose names begin so), ...; see `splits`.

    Args:
        source: The file or folder that lists the records.
        text: The form of sentences that is read, cleaned (``sent``) or ``raw``; where it is blank, the other.
        on_error: What a malformed record does: ``stop`` with an InputError, or be left out (``skip``).
        images: Whether images must be there; False where none will be opened.
    """

    source: Path
    """What messages name: the file or folder that lists the records."""
    splits: dict[str, int]
    """Each split -> its count of records, in the order of the files."""
    categories: dict[int, str]
    """Each category id -> its name; empty where the layout has no names."""
    skipped: list[str]
    """Why each record that was left out was: file, record and defect."""
    streamed: ClassVar[bool] = False
    """Records hold their images, and only `stream` gives them."""

    def __init__(
        self, source: Path, *, text: Text = "sent", on_error: OnError = "stop", images: bool = True
    ) -> None:
        self.source = source
        self.text = text
        self.on_error = on_error
        self.images = images
        self.splits = {}
        self.categories = {}
        self.skipped = []
        self._told = False

    @abstractmethod
    def _stream(self, split: str) -> Iterator[Record]:
        """Yield the records of one of ``splits`` in file order, one a sentence."""

    def stream(self, split: str) -> Iterator[Record]:
        """Yield the records of a split in file order, one a sentence; as few in memory as the layout allows.

        Raises:
            InputError: There is no split of exactly this name, no record of these classes, images are
                missing, or a record is malformed.
        """
        if split in self.splits:
            yield from self._stream(split)
            return
        part = part_of(split, self.splits)
        if part is None:
            self._refuse(split)
        classes = seen_and_unseen(self.source, self.categories)[part.seen]
        empty = True
        for whole in part.splits:
            for record in self._stream(whole):
                if _categories(record) and _categories(record) <= classes:
                    empty = False
                    yield record
        if empty:
            kind, whole = "seen" if part.seen else "unseen", " or ".join(part.splits)
            raise InputError(f"{self.source}: no record of {whole} is of {kind} classes only; use {whole}")

    def split(self, name: str) -> Split:
        """Give the sentences of a split, listed where the layout allows; raises as `stream` does."""
        return Split(self, name)

    def records(self, split: str) -> list[Record]:
        """List the records of a split in file order, one a sentence; raises as `stream` does."""
        return list(self.stream(split))

    def annotations(self, image_id: int) -> list[dict[str, Any]]:
        """List all COCO annotations of an image, in file order; none where the layout has none."""
        return []

    # ---- for the readers themselves

    def _leave_out(self, error: InputError) -> None:
        """Note a malformed record, or raise where ``on_error`` is stop."""
        if self.on_error == "stop":
            raise error
        self._note(str(error))

    def _note(self, defect: str) -> None:
        if not self._told:  # a second pass over the files finds the same ones again
            self.skipped.append(defect)

    def _tell_skipped(self) -> None:
        """Say once how many records were left out, and the first reason; raises where none is left."""
        if self.skipped and not self.splits:
            raise InputError(f"{self.skipped[0]}; so are all {len(self.skipped)} entries")
        if self.skipped:
            warnings.warn(f"{self.skipped[0]}; {len(self.skipped)} such left out", stacklevel=4)
        self._told = True

    def _sentences(self, ref: dict[str, Any], where: str) -> Iterator[tuple[int, str, str | None]]:
        """Yield number, text and what `Record.raw` keeps of each sentence of a ref that has words."""
        for number, sentence in enumerate(plain_field(ref, "sentences", list, where)):
            spot = f"{where} sentences[{number}]"
            try:
                sent_id = plain_field(sentence, "sent_id", int, spot)
                expression, raw = self._expression(sentence, spot)
            except InputError as error:
                self._leave_out(error)
                continue
            if expression:
                yield sent_id, expression, raw
            else:  # published files have such
                self._note(f"{spot} has no words")

    def _expression(self, sentence: dict[str, Any], where: str) -> tuple[str, str | None]:
        """Take a sentence in the form asked for, or in the other one where that is absent or blank."""
        keys = ("raw", "sent") if self.text == "raw" else ("sent", "raw")
        texts = [plain_field(sentence, key, str, where) for key in keys if key in sentence]
        if not texts:
            raise InputError(f"{where} has neither 'sent' nor 'raw', only {shown(list(sentence))}; {MEND}")
        texts = [text for text in (checked_expression(text, where) for text in texts) if text]
        expression = texts[0] if texts else ""
        return expression, texts[1] if self.text == "sent" and texts[1:] not in ([], texts[:1]) else None

    def _refuse_missing(self, split: str, images: Iterable[Path | bytes]) -> None:
        """Refuse a split some of whose images cannot be read; says how many."""
        if not self.images:
            return
        paths = sorted({image for image in images if isinstance(image, Path)})
        folders = Folders()
        defects = {path: defect for path in paths if (defect := folders.defect(path))}
        for path, defect in defects.items():
            count = f"as {len(defects)} of the {len(paths)} images of split {split!r}"
            if defect == "is missing":
                coco = "val2014" if "val2014" in path.name else "train2014"
                lacks = f"{path.parent}: lacks {shown(path.name)}"
                raise InputError(f"{lacks}, {count}; unpack COCO {coco} there, or set data.on_error=skip")
            raise InputError(f"{path}: {defect}, {count}; put the image itself there, or link its folder")

    def _refuse(self, split: str) -> NoReturn:
        near = [name for name in self.splits if name.casefold() == split.casefold()]
        near = near or difflib.get_close_matches(split, self.splits, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        known = ", ".join(f"{name!r} ({count})" for name, count in self.splits.items())
        raise InputError(f"{self.source}: no split {split!r}; {hint}there are {known}")


def split_of(entry: Any, where: str) -> str:
    """Take the name of a record's split.

    Raises:
        InputError: It has none, or one that cannot be asked for.
    """
    split: str = plain_field(entry, "split", str, where)
    plain = split.isprintable() and split == split.strip() and "," not in split
    if not (plain and 1 <= len(split) <= LONGEST_NAME):
        raise InputError(f"{where} has 'split' = {shown(split)}, expected a name such as train; {MEND}")
    return split


def checked_expression(expression: str, where: str) -> str:
    """Take the space off a sentence.

    Raises:
        InputError: It is absurdly long, or no text that can be written.
    """
    if len(expression) > LONGEST_SENTENCE:
        length = f"{len(expression)} characters, more than {LONGEST_SENTENCE}"
        raise InputError(f"{where} has a sentence of {length}; {MEND}")
    try:
        expression.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where} has {shown(expression)}, not valid Unicode text; {MEND}") from error
    return expression.strip()


def _categories(record: Record) -> frozenset[int]:
    found = record.category_id
    return frozenset(found if isinstance(found, tuple) else (found,))
