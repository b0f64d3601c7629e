"""The command ``metris``: one line per command; what a command needs is imported when it is called."""

import errno
import json
import os
import sys
import warnings
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from reference_model.configs import (
    PRESETS,
    Help,
    Parser,
    known_keys,
    preset_file,
    preset_names,
    read_yaml,
    refuse_unknown,
)
from reference_model.files import InputError
from reference_model.model.config import ModelConfig

# command -> where its config and its function are
COMMANDS = {
    "generate": ("synthetic.config:GenerateConfig", "synthetic.generate:generate"),
    "train": ("training.config:TrainConfig", "training.train:train"),
    "evaluate": ("scoring.config:EvaluateConfig", "scoring.evaluate:evaluate"),
    "predict": ("viewing.config:PredictConfig", "viewing.predict:predict"),
    "plot": ("viewing.config:PlotConfig", "viewing.plot:plot"),
    "export": ("checkpoints.config:ExportConfig", "checkpoints.export:export"),
    "ablate": ("training.config:AblateConfig", "ablate:ablate"),
    "profile": ("model.config:ProfileConfig", "profile:profile"),
    "push": ("checkpoints.config:PushConfig", "checkpoints.hub:share"),
    "compare": ("scoring.config:CompareConfig", "scoring.compare:compare"),
    "convert": ("data.config:ConvertConfig", "data.convert:convert"),
    "data check": ("data.config:CheckConfig", "data.check:check"),
    "data show": ("viewing.config:ShowConfig", "viewing.samples:show"),
    "app": ("app.config:AppConfig", "app.command:app"),
    "figures": ("viewing.config:FiguresConfig", "viewing.paper_figures:figures"),
    "report": ("viewing.config:ReportConfig", "viewing.report:report"),
    "info": ("viewing.config:InfoConfig", "info:info"),
    "completion": ("viewing.config:CompletionConfig", "completion:completion"),
}
# command -> what --help shows at its end; a test parses each
EXAMPLES = {
    "generate": ("--root data --scenes easy --size 96 --train 3000",),
    "train": (
        "--preset metris_tiny --data.root data --out runs/tiny",
        "--preset metris_swin_b --data.root REFER --data.dataset refcoco+ --batch_size 8 --out runs/plus",
    ),
    "evaluate": (
        "--checkpoint runs/plus --data.root REFER --splits val,testA --intervals",
        "--predictions masks.jsonl --protocol cgformer --data.root REFER --results a.jsonl",
    ),
    "predict": (
        '--checkpoint runs/plus --image photo.jpg --expression "the red boat" --out mask.png',
        '--checkpoint runs/plus --image photos --expression "a dog" --out masks --json',
        "--checkpoint runs/plus --image list.jsonl --out masks",
    ),
    "export": ("--checkpoint runs/plus --format onnx --out plus.onnx",),
    "ablate": ("--preset metris_tiny --data.root data --table 5 --seeds 3 --out runs/ablate",),
    "profile": ("--preset metris_swin_b --sentences 10 --json",),
    "push": ("--checkpoint runs/plus --repo somebody/metris --private",),
    "compare": ("a.jsonl b.jsonl",),
    "convert": ("REFER --data.dataset refcoco --out shards",),
    "data check": ("REFER --data.dataset refcocog --data.split_by umd --images",),
    "data show": ("REFER --split testA --count 20 --out samples.png",),
    "app": ("", "--checkpoint runs/plus --port 7861"),
    "figures": ("--checkpoint runs/plus --against runs/other --limit 200 --out figures",),
    "report": ("runs/plus --split testA --out report.html",),
    "plot": ("runs/plus runs/other --out losses.png",),
    "info": ("--json",),
    "completion": ("bash > ~/.local/share/bash-completion/completions/metris", "zsh > ~/.zfunc/_metris"),
}
WITH_PRESETS = ("train", "ablate", "profile")
# command -> the options that bare words at its beginning stand for; one with + takes all that come
BARE = {
    "compare": ("--a", "--b"),
    "convert": ("--data.root",),
    "plot": ("--runs+",),
    "data check": ("--data.root",),
    "data show": ("--data.root",),
    "report": ("--run",),
    "completion": ("--shell",),
}
_FLAGS = ("--json", "--baselines", "--breakdowns", "--intervals", "--images", "--cache", "--private")
_FLAGS += ("--dry_run", "--compile", "--checkpoint_activations")

_MENDABLE = {errno.ENAMETOOLONG, errno.EACCES, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        Exit code 0; 1 where a check found something wrong; 2 with a line on stderr for what a user can mend.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    warnings.formatwarning = lambda message, *_, **__: f"metris: warning: {message}\n"
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(_usage())
            return 0
        if arguments[0] == "--version":
            print(f"metris {metadata.version('metris-blocks')}")
            return 0
        name, *rest = arguments
        if rest and f"{name} {rest[0]}" in COMMANDS:
            name, rest = f"{name} {rest[0]}", rest[1:]
        if parts := [command for command in COMMANDS if command.startswith(f"{name} ")]:
            raise InputError(f"{name}: needs a second word, {' or '.join(parts)}")
        if name not in COMMANDS:
            raise InputError(f"unknown command {name}, expected one of {', '.join(COMMANDS)}")
        config = parse(name, rest)
        failed = load(COMMANDS[name][1])(config) is False
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # who read us has seen enough
        return 0
    except OSError as error:
        if error.errno not in _MENDABLE:
            raise
        return _refuse(f"{error.filename or 'output'}: {error.strerror}; choose another place")
    except (InputError, NotImplementedError) as error:
        # A worker process wraps the line in its traceback.
        return _refuse(str(error).strip().splitlines()[-1].removeprefix("reference_model.files.InputError: "))
    except KeyboardInterrupt:
        again = "; the same command goes on from the last state it saved" * (
            arguments[:1] in (["train"], ["ablate"])
        )
        print(f"metris: interrupted{again}", file=sys.stderr)
        return 130
    return int(failed)


def _refuse(line: str) -> int:
    print(f"metris: error: {line}", file=sys.stderr)
    return 2


def parse(name: str, arguments: list[str]) -> Any:
    """Turn the arguments of a command into its config: preset and config files first, then overrides.

    Raises:
        InputError: A file, key or value cannot be used.
    """
    config_class = load(COMMANDS[name][0])
    shown = [f"metris {name} {example}".rstrip() for example in EXAMPLES[name]]
    parser = Parser(
        prog=f"metris {name}",
        description=config_class.__doc__,
        epilog="\n  ".join(["examples:", *shown]),
        formatter_class=Help,
    )
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file of the options below, repeatable"
        + f"; --preset NAME takes one of this package's: {', '.join(preset_names())}"
        * (name in WITH_PRESETS),
    )
    parser.add_class_arguments(config_class, as_group=False)
    bare = BARE.get(name, ())
    while bare and arguments and not arguments[0].startswith("-"):
        arguments = [*arguments[1:], f"{bare[0]}={arguments[0]}"]
        bare = bare if bare[0].endswith("+") else bare[1:]
    files, overrides, expressions = _split(arguments, parser.prog)
    if expressions and "expression" not in known_keys(config_class):
        refuse_unknown(parser.prog, "expression", config_class)
    sources = [_source(name, path, config_class) for path in files]
    keys = [*known_keys(config_class), "help", "config", "preset", "print_config", "data.help"]
    for argument in overrides:
        key = argument.removeprefix("--").split("=")[0].removesuffix("+")
        inside_mapping = key.rsplit(".", 1)[0].endswith("_options")
        if argument.startswith("--") and key not in keys and not inside_mapping:
            refuse_unknown(parser.prog, key, config_class)
    parsed = parser.parse_args([*(f"--config={source}" for source in sources), *overrides])
    filled = vars(parser.instantiate(parsed))
    if expressions:
        filled["expression"] = expressions  # past the parser, which would read some sentences as YAML
    return config_class(**{key: value for key, value in filled.items() if key != "config"})


def _source(name: str, path: Path, config_class: type) -> str:
    """Check a config file and give its text for the parser; of a preset, `profile` takes the model."""
    if name == "profile" and path.parent == PRESETS:
        return json.dumps({"model": read_yaml(path, ModelConfig, section="model")})
    return json.dumps(read_yaml(path, config_class), default=str)


def _split(arguments: list[str], prog: str) -> tuple[list[Path], list[str], list[str]]:
    """Part config files (presets among them) from overrides; a bare --flag means true, sentences add up."""
    files, overrides, expressions = [], [], []
    waiting = list(arguments)
    while waiting:
        name, has_value, value = waiting.pop(0).partition("=")
        name = "--dry_run" if name == "--dry-run" else name
        if name in ("--config", "--preset"):
            if not has_value and not waiting:
                raise InputError(f"{prog}: {name} needs a value; see {prog} --help")
            value = value if has_value else waiting.pop(0)
            files.append(preset_file(value) if name == "--preset" else Path(value))
        elif name == "--expression" and (has_value or waiting):
            expressions.append(value if has_value else waiting.pop(0))
        elif name in _FLAGS and not has_value:
            follows = waiting[:1] in (["true"], ["false"])
            overrides.append(f"{name}={waiting.pop(0) if follows else 'true'}")
        else:
            overrides.append(f"{name}{has_value}{value}")
    return files, overrides, expressions


def _usage() -> str:
    lines = ["usage: metris COMMAND [options]", "", "commands:"]
    for name, (config, _) in COMMANDS.items():
        lines.append(f"  {name:11} {load(config).__doc__.splitlines()[0]}")
    return "\n".join(
        [*lines, "", "metris COMMAND --help lists the options of a command, with units and defaults"]
    )


def load(place: str) -> Any:
    """Import MODULE:NAME of this package."""
    module, name = place.split(":")
    return getattr(import_module(f"reference_model.{module}"), name)
