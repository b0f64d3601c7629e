"""The command ``metris``: one line per command; what a command needs is imported when it is called."""

import errno
import json
import os
import sys
import warnings
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from jsonargparse import set_parsing_settings

from reference_model.configs import (
    PRESETS,
    Help,
    Parser,
    check_bounds,
    known_flags,
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
}
_FIXABLE = {errno.ENAMETOOLONG, errno.EACCES, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    ``--traceback`` before the command, or METRIS_TRACEBACK=1, shows the stack of any error.

    Returns:
        Exit code 0; 1 where a check found something wrong; 2 with a line on stderr for what a user can fix.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    warnings.formatwarning = lambda message, *_, **__: f"metris: warning: {message}\n"
    traceback = arguments[:1] == ["--traceback"] or os.environ.get("METRIS_TRACEBACK", "0") != "0"
    if arguments[:1] == ["--traceback"]:
        arguments = arguments[1:]
    try:
        return _run(arguments)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # who read us has seen enough
        return 0
    except OSError as error:
        if error.errno not in _FIXABLE or traceback:
            raise
        return _refuse(f"{error.filename or 'output'}: {error.strerror}; choose another place")
    except (InputError, NotImplementedError) as error:
        if traceback:
            raise
        # A worker process wraps the line in its traceback.
        return _refuse(str(error).strip().splitlines()[-1].removeprefix("reference_model.files.InputError: "))
    except KeyboardInterrupt:
        again = "; the same command goes on from the last state it saved" * (
            arguments[:1] in (["train"], ["ablate"])
        )
        print(f"metris: interrupted{again}", file=sys.stderr)
        return 130


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if arguments[0] == "--version":
        print(f"metris {metadata.version('metris-blocks')}")
        return 0
    if arguments[0].startswith("--print_completion"):
        _all_commands().parse_args(arguments)
    name, *rest = arguments
    if rest and f"{name} {rest[0]}" in COMMANDS:
        name, rest = f"{name} {rest[0]}", rest[1:]
    if parts := [command for command in COMMANDS if command.startswith(f"{name} ")]:
        raise InputError(f"{name}: needs a second word, {' or '.join(parts)}")
    if name not in COMMANDS:
        raise InputError(f"unknown command {name}, expected one of {', '.join(COMMANDS)}")
    config = parse(name, rest)
    check_bounds(config)
    if hasattr(config, "check"):
        config.check()  # before a command imports torch and the encoders, which takes seconds
    failed = load(COMMANDS[name][1])(config) is False
    sys.stdout.flush()
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
    parser = _parser(name, config_class)
    bare = BARE.get(name, ())
    while bare and arguments and not arguments[0].startswith("-"):
        arguments = [*arguments[1:], f"{bare[0]}={arguments[0]}"]
        bare = bare if bare[0].endswith("+") else bare[1:]
    files, overrides, expressions = _split(arguments, config_class, parser.prog)
    if expressions and "expression" not in known_keys(config_class):
        refuse_unknown(parser.prog, "expression", config_class)
    values = [f"--config={json.dumps(_values(name, path, config_class), default=str)}" for path in files]
    keys = [*known_keys(config_class), "help", "config", "preset", "print_config"]
    given = {argument.removeprefix("--").split("=")[0].removesuffix("+") for argument in overrides}
    for key in (argument for argument in overrides if argument.startswith("--")):
        key = key.removeprefix("--").split("=")[0].removesuffix("+")
        inside_mapping = key.rsplit(".", 1)[0].endswith("_options")
        if key not in keys and not inside_mapping and not key.endswith(".help"):
            refuse_unknown(parser.prog, key, config_class)
    if "epochs" in given and "steps" not in given:
        overrides = ["--steps=null", *overrides]  # what is typed stands above the steps of a preset
    filled = vars(parser.instantiate(parser.parse_args([*values, *overrides])))
    if expressions:
        filled["expression"] = expressions  # past the parser, which would read some sentences as YAML
    return config_class(**{key: value for key, value in filled.items() if key != "config"})


def _parser(name: str, config_class: type) -> Parser:
    examples = [f"metris {name} {example}".rstrip() for example in EXAMPLES[name]]
    parser = Parser(
        prog=f"metris {name}",
        description=config_class.__doc__,
        epilog="\n  ".join(["examples:", *examples]),
        formatter_class=Help,
    )
    preset = f"; --preset NAME takes one of this package's: {', '.join(preset_names())}"
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file of the options below, repeatable" + preset * (name in WITH_PRESETS),
    )
    parser.add_class_arguments(config_class, as_group=False)
    return parser


def _all_commands() -> Parser:
    """Give one parser of all commands, whose --print_completion is jsonargparse's own script for a shell."""
    set_parsing_settings(add_print_completion_argument=True)
    whole = Parser(prog="metris")
    commands, pairs = whole.add_subcommands(), {}
    for name, (place, _) in COMMANDS.items():
        first, _, second = name.partition(" ")
        if second and first not in pairs:
            pair = Parser(prog=f"metris {first}")
            commands.add_subcommand(first, pair)
            pairs[first] = pair.add_subcommands()
        into = pairs[first] if second else commands
        into.add_subcommand(second or first, _parser(name, load(place)))
    return whole


def _values(name: str, path: Path, config_class: type) -> dict[str, Any]:
    """Read a config file under the names of today; of a preset, `profile` takes the model."""
    if name == "profile" and path.parent == PRESETS:
        return {"model": read_yaml(path, ModelConfig, section="model")}
    return read_yaml(path, config_class)


def _split(arguments: list[str], config_class: type, prog: str) -> tuple[list[Path], list[str], list[str]]:
    """Part config files (presets among them) from overrides; a bare --flag means true, sentences add up."""
    files, overrides, expressions = [], [], []
    flags = known_flags(config_class)
    waiting = list(arguments)
    while waiting:
        name, has_value, value = waiting.pop(0).partition("=")
        if name.startswith("--"):
            name = "--" + name[2:].replace("-", "_")
        if name in ("--config", "--preset"):
            if not has_value and not waiting:
                raise InputError(f"{prog}: {name} needs a value; see {prog} --help")
            value = value if has_value else waiting.pop(0)
            files.append(preset_file(value) if name == "--preset" else Path(value))
        elif name == "--expression" and (has_value or waiting):
            expressions.append(value if has_value else waiting.pop(0))
        elif name.removeprefix("--") in flags and not has_value:
            follows = waiting[:1] in (["true"], ["false"])
            overrides.append(f"{name}={waiting.pop(0) if follows else 'true'}")
        else:
            overrides.append(f"{name}{has_value}{value}")
            if name.startswith("--") and not has_value and waiting and name != "--help":
                overrides.append(waiting.pop(0))  # its value, whatever it looks like
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
