"""The model card: what a shared model is, what it learned from, how well it does and what it is not for."""

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from reference_model.model.config import ModelConfig
from reference_model.model.metris import METRIS

LIBRARY = "metris-blocks"


def model_card(model: METRIS, name: str, run: dict[str, Any], metrics: dict[str, Any]) -> ModelCard:
    """Describe a model for people and for the Hub.

    Args:
        model: With its config.
        name: What `METRIS.from_pretrained` finds it by.
        run: Settings of its training, such as ``data`` and ``batch_size``, and under ``generated`` those of a
            data set that `metris generate` made; empty where nothing is known.
        metrics: {split: {prediction: {metric: fraction, or whole number}}}, what ``evaluate`` writes; may be
            empty.
    """
    data = run.get("data") or {}
    generated = run.get("generated") or {}
    dataset, by = data.get("dataset"), data.get("split_by")
    scores = [
        EvalResult(
            task_type="image-segmentation",
            task_name="Referring image segmentation",
            dataset_type="generated" if generated else str(dataset or "unknown"),
            dataset_name=f"procedural scenes ({generated['scenes']})" if generated else f"{dataset} ({by})",
            dataset_split=split,
            metric_type=metric,
            metric_name=f"{metric}, per cent",
            metric_value=round(100 * value, 2),
        )
        for split, by_prediction in metrics.items()
        for metric, value in by_prediction.get("METRIS", {}).items()
        if isinstance(value, float) and math.isfinite(value)
    ]
    header = ModelCardData(
        license="apache-2.0",
        library_name=LIBRARY,
        pipeline_tag="image-segmentation",
        tags=["metris", "referring-image-segmentation", "referring-expression-segmentation"],
        datasets=[dataset] if dataset and not generated else None,
        metrics=list(dict.fromkeys(score.metric_type for score in scores)) or None,
        model_name=name if scores else None,
        eval_results=scores or None,
    )
    body = _BODY.format(
        name=name,
        numbers=f"{sum(p.numel() for p in model.parameters()):,}",
        config=_config_table(model.config),
        data=_data_table(run, generated),
        scores=_score_table(metrics),
        image_size=model.config.image_size,
        max_tokens=model.config.max_tokens,
        no_target=_NO_TARGET[model.config.no_target],
    )
    return ModelCard(f"---\n{header.to_yaml()}\n---\n{body}")


_NO_TARGET = {
    True: "A sentence that names nothing in the image gets an empty mask where the classifier finds so.",
    False: "Every sentence gets a mask, also one that names nothing in the image.",
}

_BODY = """
# {name}

METRIS, referring image segmentation: an image and a sentence give the mask of what the sentence names.
{numbers} parameters; made with the Python package metris-blocks.

## Use

```python
from reference_model import load

checkpoint = load("{name}")
masks = checkpoint.predict("photo.jpg", ["the red boat", "the boat on the left"])
# (sentence, height, width) bool, at the photo's own size; the photo is encoded once
```

A downloaded folder goes to the command line too, which gives masks at the image's own size:
`metris predict --checkpoint FOLDER --image photo.jpg --expression "the red boat"`.

## Configuration

What differs from the paper's setting, which the defaults of `ModelConfig` are; `config.yaml` holds all of it.

{config}

## Data and training

{data}

## Scores

{scores}

## Limits

- It knows the words and things of its training data; nothing is claimed of other languages or pictures.
- Images are resized to {image_size} x {image_size} whatever their aspect, sentences
  cut at {max_tokens} tokens.
- {no_target}
- Data sets and pretrained encoders pass their biases on, and have licences of their own. Not for decisions
  about people.
"""


def _config_table(config: ModelConfig) -> str:
    default = ModelConfig()
    pairs = [(f.name, getattr(default, f.name), getattr(config, f.name)) for f in fields(ModelConfig)]
    rows = [[f"`{name}`", _shown(new), _shown(old)] for name, old, new in pairs if old != new]
    return _table(["key", "here", "default"], rows) if rows else "Nothing differs."


def _data_table(run: dict[str, Any], generated: dict[str, Any]) -> str:
    if not run:
        return "Not known: the weights were not saved by `metris train`, or were changed since."
    data = {key: value for key, value in (run.get("data") or {}).items() if key not in ("root", "workers")}
    rows = [[f"`data.{key}`", _shown(value)] for key, value in data.items() if value is not None]
    rows += [[f"generated, `{key}`", _shown(value)] for key, value in generated.items()]
    length = "epochs" if run.get("steps") is None else "steps"
    known = (length, "batch_size", "learning_rate", "weight_decay", "contrastive_weight", "seed")
    rows += [[f"`{key}`", _shown(run[key])] for key in known if run.get(key) is not None]
    note = "Procedural scenes in REFER's layout, made by `metris generate`; splits in pictures.\n\n"
    return note * bool(generated) + _table(["setting", "value"], rows)


def _score_table(metrics: dict[str, Any]) -> str:
    if not metrics:
        return "Not known: no scores of `metris evaluate` came with these weights."
    found = [(split, who, scores) for split, by_name in metrics.items() for who, scores in by_name.items()]
    names = list(dict.fromkeys(n for *_, scores in found for n, v in scores.items() if _is_number(v)))
    value = lambda v: f"{100 * v:.2f}" if isinstance(v, float) else _shown(v)
    rows = [[split, who, *(value(scores.get(n, "")) for n in names)] for split, who, scores in found]
    sets: dict[str, str] = {}
    for split, _, scores in found:
        if said := scores.get("evaluation"):
            name = f"`{said['dataset']}`, protocol `{said['protocol']}`"
            sets[name] = f"{sets[name]}, {split}" if name in sets else split
    if len(sets) > 1:  # splits of several evaluations stand in one table
        sets = {f"{splits} of {name}": splits for name, splits in sets.items()}
    note = (
        f"Per cent, as `metris evaluate` wrote them: {' and '.join(sorted(sets)) or 'of a set not named'}.\n"
        "Predictions other than METRIS never read the sentence.\n\n"
    )
    return note + _table(["split", "prediction", *names], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items()) or "none"
    return " ".join(str(value.name if isinstance(value, Path) else value).split())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
