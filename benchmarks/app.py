"""How long an answer of the page takes, without the browser: ``python -m benchmarks.app demo/run IMAGE``."""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from reference_model.app import session as web_session
from reference_model.checkpoints.checkpoint import load_checkpoint

SENTENCES = ("the red circle", "biggest star", "left most thing\nthe green square\na triangle")


def main() -> None:
    """Time what a click does: read, encode if the image is new, refer, draw masks and words, write files."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("run", type=Path, help="folder that train wrote")
    parser.add_argument("image", type=Path, help="image of any size")
    parser.add_argument("--rounds", type=int, default=20, help="answers after the first (default: 20)")
    given = parser.parse_args()
    checkpoint, session, seconds = load_checkpoint(given.run), web_session.Session(), []
    with tempfile.TemporaryDirectory() as folder:
        session.folder = folder
        for i in range(given.rounds + 1):
            begin = time.perf_counter()
            lines = SENTENCES[i % len(SENTENCES)]
            session = web_session.asked(checkpoint, str(given.image), lines, checkpoint.config.ratio, session)
            web_session.painted(web_session.cut_at(session, 0.5), 0.6)
            kind = web_session.MAPS[i % len(web_session.MAPS)]
            web_session.tiles(session.encoded, session.found[0], kind)
            seconds.append(time.perf_counter() - begin)
    first, *after = seconds
    print(
        f"first {first:.3f} s; {len(after)} after it: median {statistics.median(after):.3f} s, "
        f"slowest {max(after):.3f} s; {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
