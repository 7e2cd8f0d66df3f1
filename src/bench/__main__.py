"""What one adapter on one backbone costs: memory, FLOPs and time of a training step or of drawing a picture.

    python -m src.bench backbone=sd3_medium adapter=unicon_half hardware=h200 resolution=1024 batch=8

The last line printed is `run: <folder>`; its results.json has the kind "cost". Exit code 3: out of memory, which is a result
too. One cell is one process: with `-m` each cell of a sweep gets its own.
"""

from omegaconf import DictConfig

from src.bench.known import refuse_known
from src.config import cli


def main(cfg: DictConfig) -> None:
    """The entry. Heavy imports wait until the configuration has been found good."""
    from src.bench.cell import OutOfMemory, run

    try:
        run(cfg)
    except OutOfMemory as why:
        raise SystemExit(why.report()) from None


if __name__ == "__main__":
    cli("bench", main, early=refuse_known)
