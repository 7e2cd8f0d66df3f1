"""Tables, charts, pictures and one page of finished runs, evaluations and benchmarks.

    python -m src.report runs=[runs/unicon_sd3_tiny_canny,runs/controlnet_sd21_tiny_canny] out=report
    python -m src.report wandb runs=[runs] project=controlbench

Reads every results.json below the folders. Rows that differ in backbone, task, images seen, sampling, device or precision
never share a table. `wandb` writes a dashboard of the same for Weights & Biases.
"""

import sys
from pathlib import Path

from omegaconf import DictConfig

from src.config import ConfigError, cli
from src.config.messages import nearest

VERBS = ("wandb",)


def main(cfg: DictConfig) -> None:
    """Write report.html, tables and figures into cfg.out. Raises UserError for folders without results."""
    from src.report.write import write_report

    files = write_report(cfg.runs, Path(cfg.out), one_table=cfg.one_table)
    for file in files:
        print(f"wrote {file}", flush=True)


def wandb(cfg: DictConfig) -> None:
    """Write the definition of a W&B workspace, and save it there if asked to. Raises UserError."""
    from src.report.dashboard import define, push

    push(cfg) if cfg.push else define(cfg)


def entry(argv: list[str]) -> None:
    """Run the verb that `argv`, the words behind the module's name, begins with, or the report itself."""
    if argv and argv[0] in VERBS:
        sys.argv[1:] = argv[1:]
        cli("report_wandb", wandb)
        return
    if argv and argv[0].isalpha():
        fault = ConfigError(f"command line: {argv[0]} is no verb of src.report{nearest(argv[0], VERBS)}")
        print(f"error: {fault}", file=sys.stderr)
        raise SystemExit(2)
    cli("report", main)


if __name__ == "__main__":
    entry(sys.argv[1:])
