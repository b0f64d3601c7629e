"""Options of the page; no torch here."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from reference_model.checkpoints.config import refuse_incomplete
from reference_model.files import InputError


@dataclass(frozen=True)
class AppConfig:
    """Serve a page on this computer: an image in, sentences in, masks and all on the way to them out."""

    checkpoint: Path | None = None
    """Folder that train wrote. None: the demo's, trained first if it is not there (minutes)."""
    demo: Path = Path("demo")
    """Folder of the demo, for its data and its run, where no checkpoint is given."""
    host: str = "127.0.0.1"
    """Address to listen on; 127.0.0.1 is this computer alone, 0.0.0.0 lets others in. Of a machine that is
    reached by ssh: ssh -L 7860:127.0.0.1:7860 MACHINE, and the page is on one's own computer."""
    port: int = 7860
    """Port to listen on, in [1, 65535]."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a GPU where there is one."""

    def check(self) -> None:
        """Refuse what can be refused before torch is imported."""
        for package in ("gradio", "matplotlib"):
            if find_spec(package) is None:
                raise InputError("app", f"needs {package}", "pip install 'metris-blocks[app]'")
        if not 1 <= self.port <= 65535:
            raise InputError("port", f"must be in [1, 65535], got {self.port}", "7860 is usual")
        if self.checkpoint is not None:
            refuse_incomplete(self.checkpoint)
