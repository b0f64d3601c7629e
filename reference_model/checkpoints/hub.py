"""Share a model: save it with a model card, push it to the Hugging Face Hub, fetch it from there."""

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import yaml
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import PreTrainedTokenizerBase

from reference_model.checkpoints import export
from reference_model.checkpoints.card import LIBRARY, model_card
from reference_model.checkpoints.checkpoint import (
    CONFIG,
    GENERATED,
    TOKENIZER,
    WEIGHTS,
    Checkpoint,
    load_checkpoint,
    load_weights,
    refuse_larger,
    save_weights,
    start_checkpoint,
)
from reference_model.checkpoints.config import PushConfig
from reference_model.configs import read_yaml, to_yaml
from reference_model.files import InputError, written_whole
from reference_model.model import metris as network
from reference_model.model.build import build_metris
from reference_model.model.config import ModelConfig
from reference_model.processes import pick_device

METRICS, CARD = "metrics.json", "README.md"

# By their full endings: what is fetched can hold no pickle and no code.
FETCHED = [WEIGHTS, CONFIG, f"{TOKENIZER}/*.json", f"{TOKENIZER}/*.txt", METRICS, CARD, GENERATED]


class METRIS(network.METRIS):
    """METRIS with the three methods that users of the Hugging Face Hub know.

    Args:
        tokenizer: Of its text encoder; None for a network that nothing was trained with.
        source: Folder that the weights came from, whose scores go along while the weights are still those.
        parts: The network's own arguments.
    """

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        source: Path | None = None,
        **parts: Any,
    ) -> None:
        super().__init__(**parts)
        self.tokenizer, self.source = tokenizer, source

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        strict: bool = True,
        **hub: Any,
    ) -> "METRIS":
        """Load a checkpoint, ready for inference.

        Args:
            source: Folder that train or `save_pretrained` wrote, or OWNER/NAME on the Hugging Face Hub.
            device: Where the model goes.
            strict: Refuse a checkpoint that lacks weights or has others; False warns and loads what fits.
            hub: ``revision``, ``token``, ``cache_dir`` and ``local_files_only`` of `huggingface_hub`.

        Raises:
            InputError: The checkpoint cannot be had, is broken, or does not fit its config.
        """
        return load_folder(fetch(source, **hub), device=device, strict=strict).model

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        """Write a checkpoint with a model card, atomically; as `save`."""
        save(self._complete(tokenizer, "save_pretrained"), self.source, Path(folder))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload METRIS",
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> str:
        """Upload a checkpoint with a model card to the Hub and return its URL; as `push`."""
        checkpoint = self._complete(tokenizer, "push_to_hub")
        options = {"private": private, "token": token, "commit_message": commit_message}
        return push(checkpoint, self.source, repo_id, **options)

    def _complete(self, tokenizer: PreTrainedTokenizerBase | None, what: str) -> Checkpoint:
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        if tokenizer is None:
            step = f"give that of its training, {what}(..., tokenizer=tokenizer)"
            raise InputError(what, "the model has no tokenizer", step)
        refuse_larger(tokenizer, self.config, what)
        return Checkpoint(self, tokenizer, self.config)


def load(
    source: str | os.PathLike[str], *, device: torch.device | str = "auto", strict: bool = True, **hub: Any
) -> Checkpoint:
    """Load a model with its tokenizer, ready to predict.

    Args:
        source: Folder of a run or a saved model, file that ``metris export`` wrote, or OWNER/NAME on the Hub.
        device: cpu, cuda, cuda:1 ...; auto takes a GPU where there is one.
        strict: As in `METRIS.from_pretrained`.
        hub: ``revision``, ``token``, ``cache_dir`` and ``local_files_only`` of `huggingface_hub`.

    Raises:
        InputError: There is none, or it is broken.
    """
    if Path(source).is_file():
        return export.load(Path(source), device=str(device))
    folder = fetch(source, **hub)
    return load_folder(folder, device=pick_device(str(device)), strict=strict)


def load_folder(folder: Path, *, device: torch.device | str, strict: bool) -> Checkpoint:
    """Load a folder, its model as the Hub's METRIS, which keeps its tokenizer and where it came from."""
    checkpoint = load_checkpoint(folder, device=device, strict=strict)
    model = checkpoint.model.with_parts(METRIS, tokenizer=checkpoint.tokenizer, source=folder)
    return replace(checkpoint, model=model)


def build(config: ModelConfig, *, tokenizer: PreTrainedTokenizerBase | None = None) -> METRIS:
    """Build the model of a config, with fresh weights unless the config names others.

    Args:
        config: From `preset`, or made by hand.
        tokenizer: To be saved with the model.

    Raises:
        InputError: A value is out of range, or an encoder cannot be had.
    """
    return build_metris(config).with_parts(METRIS, tokenizer=tokenizer)


def share(config: PushConfig) -> str:
    """Run the command ``push`` and return the URL of the repository.

    Raises:
        InputError: The checkpoint cannot be used, or the Hub refuses.
    """
    checkpoint = load_checkpoint(config.checkpoint)
    url = push(checkpoint, config.checkpoint, config.repo, private=config.private or None)
    print(json.dumps({"url": url}) if config.json else url)
    return url


def fetch(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Give the folder of a checkpoint: ``source`` itself, or what the Hub has as OWNER/NAME.

    A `Path` is never looked up on the Hub. The other arguments are huggingface_hub's.

    Raises:
        InputError: There is none, or it cannot be fetched.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise InputError(
                f"checkpoint {source}: is a folder here, without revisions; drop revision={revision}"
            )
        return Path(source)
    if isinstance(source, Path) or Path(source).exists():
        raise InputError(f"checkpoint {source}: is no folder; give the one that train wrote")
    try:
        folder = huggingface_hub.snapshot_download(
            source,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=FETCHED,
            library_name=LIBRARY,
        )
    except Exception as error:
        raise InputError(f"checkpoint {source}: is no folder here, and {_refusal(error)}") from error
    return Path(folder)


def push(
    checkpoint: Checkpoint,
    source: Path | None,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload METRIS",
) -> str:
    """Write a checkpoint with its card to a repository of the Hub, in place of the one that is there.

    Args:
        checkpoint: Of a network, not of an exported file.
        source: Folder of its run, whose settings and scores go along while the weights are still those.
        repo_id: OWNER/NAME; without OWNER the token's own. Made where it is not there.
        private: Of a new repository; None: as the Hub's settings say. True refuses one that is public.
        token: With the right to write. None: that of ``hf auth login``.
        commit_message: Of the upload.

    Returns:
        The URL of the repository.

    Raises:
        InputError: The Hub refuses or cannot be reached.
    """
    _history(checkpoint.model, source)  # refuses broken scores before a repository is made
    with tempfile.TemporaryDirectory() as room:
        try:
            api = huggingface_hub.HfApi(token=token, library_name=LIBRARY)
            # Before the work: no token and no network show here.
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            is_public = bool(private) and not api.model_info(url.repo_id).private
        except Exception as error:
            raise InputError(f"push to {repo_id}: {_refusal(error)}") from error
        if is_public:
            raise InputError(f"push to {repo_id}: is there and public; make it private, or name another")
        folder = Path(room) / "checkpoint"
        save(checkpoint, source, folder, name=url.repo_id)
        try:
            api.upload_folder(
                repo_id=url.repo_id,
                folder_path=folder,
                commit_message=commit_message,
                # Of an earlier push: scores and words that are not this model's.
                delete_patterns=[METRICS, GENERATED, f"{TOKENIZER}/*"],
            )
        except Exception as error:
            raise InputError(f"push to {repo_id}: {_refusal(error)}") from error
    return str(url)


def save(checkpoint: Checkpoint, source: Path | None, folder: Path, *, name: str | None = None) -> None:
    """Write a checkpoint with its model card, whole or not at all; it replaces a checkpoint that is there.

    Args:
        checkpoint: Of a network, not of an exported file.
        source: Folder of its run, whose settings and scores go along while the weights are still those.
        folder: New, empty, or a checkpoint with nothing else in it.
        name: For the card, OWNER/NAME. None: the folder's.

    Raises:
        InputError: The folder holds something else, or it cannot be written.
    """
    model = checkpoint.model
    folder = folder.resolve()
    # It is replaced as one piece: what else lies in it would be lost.
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if other := sorted(there - {CONFIG, WEIGHTS, TOKENIZER, METRICS, CARD, GENERATED}):
        raise InputError(f"{folder}: holds {other[0]}, which is no part of a checkpoint; give a new folder")
    run, metrics = _history(model, source)
    started_from, generated = run.pop("model", {}), run.get("generated")
    config = to_yaml(replace(model.config, **started_from))
    public = _without_places({**run, "model": yaml.safe_load(config)})
    with written_whole(folder) as fresh:
        start_checkpoint(
            fresh, yaml.safe_dump(public, sort_keys=False, allow_unicode=True), checkpoint.tokenizer
        )
        save_weights(fresh, model)
        if generated:
            (fresh / GENERATED).write_text(json.dumps(generated) + "\n", encoding="utf-8")
        if metrics:
            (fresh / METRICS).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        card = model_card(model, name or folder.name, run, metrics)
        (fresh / CARD).write_text(str(card), encoding="utf-8")


def _history(model: network.METRIS, source: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give the run's settings and scores; both empty where the weights are not (or no longer) those of a run.

    Of the settings' section ``model`` only what the encoders started from is given.
    """
    if source is None or not _has_weights_of(model, source):
        return {}, {}
    written = read_yaml(source / CONFIG, ModelConfig, section="model")
    run = yaml.safe_load((source / CONFIG).read_text(encoding="utf-8"))
    started_from = ("pretrained", "image_weights", "text_weights")
    run["model"] = {key: written[key] for key in started_from if written.get(key) is not None}
    if (source / GENERATED).is_file():
        run["generated"] = json.loads((source / GENERATED).read_text(encoding="utf-8"))
    path = source / METRICS
    if not path.is_file():
        return run, {}
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        sound = all(isinstance(s, dict) for by_name in metrics.values() for s in by_name.values())
    except (ValueError, AttributeError):
        sound = False
    if not sound:
        shape = "{split: {prediction: {metric: number}}}"
        raise InputError(f"{path}: does not hold {shape}; run metris evaluate again, or remove it")
    return run, metrics


def _has_weights_of(model: network.METRIS, folder: Path) -> bool:
    try:
        theirs = load_weights(folder)
    except InputError:  # gone since
        return False
    ours = model.state_dict()
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == tensor.dtype and torch.equal(ours[name].cpu(), tensor)
        for name, tensor in theirs.items()
    )


def _without_places(run: dict[str, Any]) -> dict[str, Any]:
    """Leave out where things lay: it tells about a machine, and leads to other things on another one."""

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cut(item) for key, item in value.items()}
        return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value

    run = {key: cut(value) for key, value in run.items() if key not in ("out", "generated")}
    if isinstance(run.get("data"), dict):
        run["data"].pop("root", None)
    return run


def _refusal(error: Exception) -> str:
    """Say why the Hub gives nothing, and what to do."""
    login = "run hf auth login, or pass a token"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, HFValidationError):
        return "no repository of the Hub can have this name; check the path, or give OWNER/NAME"
    if isinstance(error, GatedRepoError):
        return f"on the Hub it is gated; ask for access on its page, then {login}"
    if isinstance(error, RevisionNotFoundError):
        return "on the Hub it has no such revision; name a branch, tag or commit of it"
    if isinstance(error, RepositoryNotFoundError):
        return f"the Hub has none of this name, or a private one; check it, or {login}"
    if isinstance(error, LocalTokenNotFoundError) or status in (401, 403):
        return f"the Hub refuses without a token that may do this; {login}"
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        return "the Hub cannot be reached for it; check the name, or go online (HF_HUB_OFFLINE=0)"
    reason = " ".join(str(error).split("\n", 1)[0].split()) or type(error).__name__
    kind = "refuses" if isinstance(error, HfHubHTTPError) else "cannot be reached"
    return f"the Hub {kind} ({reason}); try again later"
