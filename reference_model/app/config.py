"""Options of the page; no torch here."""

from dataclasses import dataclass
from pathlib import Path


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
