"""What works with what: one table, asked of the code, told in the README, kept by every entry."""

import pytest
from omegaconf import OmegaConf

from src.config import CONF, Unsupported, load
from src.config.nodes import node_of
from src.construct import construct
from src.support import check_cell, matrix, options, reasons, table, tasks_line
from src.tasks.pose import Pose
from tests.conftest import QUICK, ROOT, run_entry

NAMED = {"controlnet": {"sd21", "sd21_tiny", "sdxl"}, "scedit": {"sd21", "sd21_tiny", "sdxl"}}
NAMED["dit_controlnet"] = {"sd3_tiny", "sd3_medium", "sd3_5_medium", "sd3_5_large", "pixart_tiny", "pixart_alpha"}


def test_the_table_knows_every_adapter_and_backbone():
    found = matrix()
    assert sorted(found) == options("adapter")
    assert all(sorted(row) == options("backbone") for row in found.values())
    for adapter, row in found.items():
        expected = NAMED.get(adapter, set(options("backbone")))
        assert {b for b, reason in row.items() if reason is None} == expected, adapter


def test_a_node_is_read_as_it_is_composed():
    """Which holds while these files lean on nothing outside of their group."""
    cfg = OmegaConf.to_container(load("train", ["adapter=unicon_half", "backbone=pixart_tiny", "task=pose"]), resolve=True)
    for group, name in {"adapter": "unicon_half", "backbone": "pixart_tiny", "task": "pose"}.items():
        assert node_of(group, name) == cfg[group]
        for file in (CONF / group).glob("*.yaml"):
            assert "${" not in file.read_text()
            assert all("/" not in base for base in OmegaConf.load(file).get("defaults", [])), file


def test_every_empty_cell_says_why_and_what_instead():
    found = matrix()
    empty = [reason for row in found.values() for reason in row.values() if reason]
    assert empty
    assert all("use adapter=" in reason for reason in empty)
    assert "controlnet not on pixart_alpha, pixart_tiny: it works on U-Net" in reasons()


def test_the_readme_holds_the_table():
    assert table() in (ROOT / "README.md").read_text()


def test_the_entry_lists_it():
    done = run_entry("train", "--list")
    assert done.returncode == 0, done.stderr
    assert table() in done.stdout
    assert reasons() in done.stdout


def test_full_size_backbones_have_a_shape_of_their_name():
    shapes = OmegaConf.to_container(OmegaConf.load(ROOT / "src" / "backbones" / "shapes.json"))
    full = {
        b for b in options("backbone") if not OmegaConf.load(CONF / "backbone" / f"{b}.yaml").source.startswith("embedded:")
    }
    assert set(shapes) == full


def test_an_empty_cell_is_refused_in_one_line_before_a_weight_is_read():
    done = run_entry("train", "adapter=controlnet", "backbone=sd3_tiny", *QUICK)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2
    assert len(errors) == 1
    assert "adapter=controlnet backbone=sd3_tiny" in errors[0]
    # of the same idea on this backbone; with this adapter another embedded backbone, not a full-size one
    assert errors[0].endswith("(on this backbone: dit_controlnet; with this adapter: backbone=sd21_tiny)")
    assert "estimated peak" not in done.stdout


def test_a_task_that_refuses_a_backbone_stands_in_the_table_and_is_refused(monkeypatch):
    monkeypatch.setattr(Pose, "refusal", classmethod(lambda cls, facts, **options: "no people" if facts.spatial else None))
    assert tasks_line().startswith(
        "Every cell works with every task: canny, deblur, depth, super_resolution. But pose not on sd21"
    )
    assert "pose not on sd21_tiny: no people" in reasons()
    cfg = load("train", ["adapter=unicon", "backbone=sd21_tiny", "task=pose", "hardware=cpu"])
    with pytest.raises(Unsupported, match=r"task=pose backbone=sd21_tiny: no people \(on this backbone: canny, deblur"):
        check_cell(cfg, construct(cfg.backbone))


@pytest.mark.slow
def test_a_sweep_over_everything_runs_what_exists_and_skips_the_rest(tmp_path, cache_dir):
    methods, bases = (
        ["unicon", "unicon_half", "controlnet", "dit_controlnet", "t2i_adapter"],
        ["sd3_tiny", "pixart_tiny", "sd21_tiny"],
    )
    cells = [f"adapter={','.join(methods)}", f"backbone={','.join(bases)}"]
    done = run_entry("train", "-m", *cells, *QUICK, f"output_dir={tmp_path}", f"cache_dir={cache_dir}", timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    found = matrix()
    exist = sum(found[m][b] is None for m in methods for b in bases)
    assert len(list(tmp_path.glob("*/*/results.json"))) == exist == 12
    assert done.stderr.count("skipped: job") == 3
