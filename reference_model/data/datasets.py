"""From where the data is to the reader of its layout, which is told by what is there."""

from pathlib import Path
from typing import Any, NoReturn

from reference_model.data.config import DataConfig
from reference_model.data.readers.cris import Cris, cris_set
from reference_model.data.readers.grefer import GRefer, RefZom
from reference_model.data.readers.jsonl import Jsonl
from reference_model.data.readers.parquet import Hub, parquet_files
from reference_model.data.readers.reader import Reader
from reference_model.data.readers.refer import Refer
from reference_model.data.readers.shards import Shards
from reference_model.data.untrusted import listing
from reference_model.files import InputError

_REF_ZOM = ("ref-zom", "refzom")


def read(config: DataConfig, *, images: bool = True) -> Reader:
    """Read a data set of any known layout whole, but for shards, which are read as they are asked for.

    Args:
        config: Where it is, and how it is read.
        images: Whether images will be opened. If not, those of other layouts than shards need not be there.

    Raises:
        InputError: There is nothing known; a file is missing or malformed, or an entry contradicts another
            one.
    """
    root, dataset = Path(config.root), config.dataset
    options: dict[str, Any] = {"text": config.text, "on_error": config.on_error, "images": images}
    if str(root).startswith(("http:/", "https:/")):
        return Shards(root, text=config.text, on_error=config.on_error)
    if root.is_file():
        if root.suffix.lower() not in (".jsonl", ".ndjson"):
            raise InputError(f"{root}: is a {root.suffix or 'plain'} file; give a .jsonl file or a folder")
        return Jsonl(root, **options)
    folder = root / dataset
    if dataset in _REF_ZOM and not folder.is_dir():
        folder = next((root / name for name in _REF_ZOM if (root / name).is_dir()), folder)
    if folder.is_dir() and any(map(_is_refs, folder.iterdir())):
        return _refer(folder)(root, folder.name, config.split_by, **options)
    if cris_set(root, dataset, config.split_by) is not None:
        return Cris(root, dataset, config.split_by, **options)
    if parquet_files(root):
        return Hub(root, **options)
    if any(root.glob("*-*.tar")):
        return Shards(root, text=config.text, on_error=config.on_error)
    if folder.is_dir():
        return _refer(folder)(root, folder.name, config.split_by, **options)
    _refuse(root, folder)


def _is_refs(path: Path) -> bool:
    return path.name.startswith(("refs(", "grefs(", "Ref-ZOM("))


def _refer(folder: Path) -> type[Refer]:
    """Tell by its files, or where there are none by its name, whose reader a folder of refs needs."""
    names = [path.name for path in folder.iterdir()]
    if folder.name == "grefcoco" or any(name.startswith("grefs(") for name in names):
        return GRefer
    zom = folder.name in _REF_ZOM or any(name.startswith("Ref-ZOM(") for name in names)
    return RefZom if zom else Refer


def _refuse(root: Path, folder: Path) -> NoReturn:
    if not root.is_dir():
        raise InputError(f"{root}: no such file or folder; give the root of a data set")
    wanted = (
        f"{folder.name}/refs(...).p, {folder.name}/grefs(...).json, anns/{folder.name}/, "
        "<split>-00000-of-00001.parquet, <split>-000000.tar"
    )
    lines = sorted(root.glob("*.jsonl"))
    hint = f"give {lines[0]} itself" if lines else "see data.root and data.dataset"
    raise InputError(f"{folder}: no such folder; {root} holds {listing(root)}, none of {wanted}; {hint}")
