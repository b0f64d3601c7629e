"""What to profile, and how often; torch-free."""

from dataclasses import dataclass, field

from reference_model.model.config import ModelConfig


@dataclass(frozen=True)
class ProfileConfig:
    """Print parameters, GMACs, latency and peak memory of the model, part by part.

    Needs neither data nor a network: model.pretrained is set aside, and the weights are random unless
    local files are given.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    image_size: int | None = None
    """Side of the square images in pixels. None: model.image_size."""
    tokens: int | None = None
    """Tokens of each sentence, none of them padding, in [3, 512]. None: model.max_tokens."""
    batch_size: int = 1
    """Images of a forward pass, with one sentence each, in [1, 1024]."""
    sentences: int = 5
    """Sentences about one image, for the cost of encoding it once, in [1, 1024]."""
    rounds: int = 5
    """Timed rounds, of which the median is given; each runs every part once, in turn. One more warms up."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a GPU where there is one."""
    threads: int | None = None
    """Threads on the CPU, in [1, 1024]. None: torch's choice."""
    json: bool = False
    """Print one JSON object instead of tables."""
