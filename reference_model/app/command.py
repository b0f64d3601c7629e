"""The command ``app``: a checkpoint, or else the demo's, in the browser."""

import socket
import sys
from dataclasses import replace
from pathlib import Path

from reference_model.app.config import AppConfig
from reference_model.checkpoints.checkpoint import WEIGHTS, load_checkpoint
from reference_model.configs import build, preset_file, read_yaml
from reference_model.files import InputError
from reference_model.processes import pick_device
from reference_model.synthetic.config import GenerateConfig

DEMO = GenerateConfig(
    root=Path("demo/data"), scenes="easy", size=96, train=3000, val=120, test=100, workers=2
)
"""The data of ``make demo``."""


def app(config: AppConfig) -> None:
    """Run the command ``app`` until it is interrupted.

    Raises:
        InputError: The checkpoint cannot be used, the port is taken, or gradio is missing.
    """
    config.check()
    _refuse_taken(config.host, config.port)
    device = pick_device(config.device)
    folder = demo_run(config.demo) if config.checkpoint is None else config.checkpoint
    checkpoint = load_checkpoint(folder, device=device)
    print("starting; this takes some seconds", file=sys.stderr, flush=True)
    from reference_model.app import page as web_page

    web_page.serve(web_page.blocks(checkpoint, folder), host=config.host, port=config.port)


def demo_run(folder: Path, *, data: GenerateConfig = DEMO, steps: int | None = None) -> Path:
    """Give the run of ``make demo`` in a folder, its data made and its model trained first if need be.

    Args:
        folder: Of the demo.
        data: What to generate; its root is set aside.
        steps: Of training. None: the preset's.
    """
    run = folder / "run"
    if (run / WEIGHTS).is_file():
        return run
    from reference_model.synthetic.generate import generate
    from reference_model.training.config import TrainConfig
    from reference_model.training.train import train

    print(
        f"no --checkpoint given and {run} holds none: training the demo's small model on made scenes, "
        "about 5 minutes on 2 CPU cores, once",
        file=sys.stderr,
    )
    generate(replace(data, root=folder / "data"))
    values = read_yaml(preset_file("metris_tiny"), TrainConfig)
    values |= {"data": {"root": str(folder / "data")}, "out": str(run)}
    values |= {} if steps is None else {"steps": steps}
    train(build(TrainConfig, values, source="metris_tiny"))
    return run


def _refuse_taken(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, UnicodeError) as error:
            raise InputError(
                f"{host}:{port}: cannot be listened on ({error}); choose another --port"
            ) from error
