"""Share a model: save it with a model card, push it to the Hugging Face Hub, fetch it from there."""

import json
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

from reference_model.checkpoints.card import LIBRARY, model_card
from reference_model.checkpoints.checkpoint import (
    CONFIG,
    GENERATED,
    TOKENIZER,
    WEIGHTS,
    load_checkpoint,
    load_weights,
    refuse_larger,
    save_weights,
    start_checkpoint,
)
from reference_model.checkpoints.config import PushConfig
from reference_model.configs import read_yaml, to_yaml
from reference_model.files import InputError, written_whole
from reference_model.model.config import ModelConfig
from reference_model.model.metris import METRIS

METRICS, CARD = "metrics.json", "README.md"

# By their full endings: what is fetched can hold no pickle and no code.
FETCHED = [WEIGHTS, CONFIG, f"{TOKENIZER}/*.json", f"{TOKENIZER}/*.txt", METRICS, CARD, GENERATED]


def share(config: PushConfig) -> str:
    """Run the command ``push`` and return the URL of the repository.

    Raises:
        InputError: The checkpoint cannot be used, or the Hub refuses.
    """
    url = push(load_checkpoint(config.checkpoint).model, config.repo, private=config.private or None)
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

    A `Path` is never looked up on the Hub. The other arguments are `METRIS.from_pretrained`'s.

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
    model: METRIS,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload METRIS",
) -> str:
    """Write a checkpoint with its card to a repository of the Hub, in place of the one that is there.

    Args:
        model: With its config and its tokenizer.
        repo_id: OWNER/NAME; without OWNER the token's own. Made where it is not there.
        private: Of a new repository; None: as the Hub's settings say. True refuses one that is public.
        token: With the right to write. None: that of ``hf auth login``.
        commit_message: Of the upload.

    Returns:
        The URL of the repository.

    Raises:
        InputError: The model has no tokenizer, or the Hub refuses or cannot be reached.
    """
    _refuse_incomplete(model, "push_to_hub")
    _history(model)  # refuses broken scores before a repository is made
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
        save(model, folder, name=url.repo_id)
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


def save(model: METRIS, folder: Path, *, name: str | None = None) -> None:
    """Write a checkpoint with its model card, whole or not at all; it replaces a checkpoint that is there.

    What is known of the run (data, settings, scores) comes from the checkpoint that the model was loaded
    from, and goes along as long as the weights are still those.

    Args:
        model: With its config and its tokenizer.
        folder: New, empty, or a checkpoint with nothing else in it.
        name: For the card, OWNER/NAME. None: the folder's.

    Raises:
        InputError: The model has no tokenizer, the folder holds something else, or it cannot be written.
    """
    _refuse_incomplete(model, "save_pretrained")
    folder = folder.resolve()
    # It is replaced as one piece: what else lies in it would be lost.
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if other := sorted(there - {CONFIG, WEIGHTS, TOKENIZER, METRICS, CARD, GENERATED}):
        raise InputError(f"{folder}: holds {other[0]}, which is no part of a checkpoint; give a new folder")
    run, metrics = _history(model)
    started_from, generated = run.pop("model", {}), run.get("generated")
    config = to_yaml(replace(model.config, **started_from))
    public = _without_places({**run, "model": yaml.safe_load(config)})
    with written_whole(folder) as fresh:
        start_checkpoint(fresh, yaml.safe_dump(public, sort_keys=False, allow_unicode=True), model.tokenizer)
        save_weights(fresh, model)
        if generated:
            (fresh / GENERATED).write_text(json.dumps(generated) + "\n", encoding="utf-8")
        if metrics:
            (fresh / METRICS).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        card = model_card(model, name or folder.name, run, metrics)
        (fresh / CARD).write_text(str(card), encoding="utf-8")


def _history(model: METRIS) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give the run's settings and scores; both empty where the weights are not (or no longer) those of a run.

    Of the settings' section ``model`` only what the encoders started from is given.
    """
    if model.source is None or not _has_weights_of(model, model.source):
        return {}, {}
    written = read_yaml(model.source / CONFIG, ModelConfig, section="model")
    run = yaml.safe_load((model.source / CONFIG).read_text(encoding="utf-8"))
    started_from = ("pretrained", "image_weights", "text_weights")
    run["model"] = {key: written[key] for key in started_from if written.get(key) is not None}
    if (model.source / GENERATED).is_file():
        run["generated"] = json.loads((model.source / GENERATED).read_text(encoding="utf-8"))
    path = model.source / METRICS
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


def _has_weights_of(model: METRIS, folder: Path) -> bool:
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


def _refuse_incomplete(model: METRIS, what: str) -> None:
    if model.config is None:
        raise InputError(f"{what}: the model has no config; build it with build_metris")
    if model.tokenizer is None:
        raise InputError(f"{what}: the model has no tokenizer; set model.tokenizer to that of its training")
    refuse_larger(model.tokenizer, model.config, what)


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
