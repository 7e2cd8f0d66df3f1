"""Tables and grids of finished runs.

    python -m src.report runs=[runs/unicon_sd3_tiny_canny,runs/controlnet_sd21_tiny_canny] out=report

Reads every results.json below the folders. Runs that differ in backbone, task, images seen or sampling never share a table.
"""

from pathlib import Path

from omegaconf import DictConfig

from src.config import cli
from src.report.grids import plot_side_by_side
from src.report.rows import groups, read_rows
from src.report.tables import csv_text, markdown
from src.results import write_atomic


def main(cfg: DictConfig) -> None:
    """Write table.md, table.csv and one grid per group into cfg.out. Raises UserError for folders without results."""
    rows, out = read_rows(cfg.runs), Path(cfg.out)
    grouped = groups(rows)
    out.mkdir(parents=True, exist_ok=True)
    text = markdown(grouped)
    write_atomic(out / "table.md", text.encode())
    write_atomic(out / "table.csv", csv_text(rows).encode())
    files = [plot_side_by_side(conditions, members, out) for conditions, members in grouped]
    print(text)
    print(f"{len(rows)} runs in {len(grouped)} groups")
    for file in (out / "table.md", out / "table.csv", *filter(None, files)):
        print(f"wrote {file}", flush=True)


if __name__ == "__main__":
    cli("report", main)
