"""Checkpoints: adapter only, atomic, safe to read, and refused by name where they do not fit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from src.checkpoint import EMA_KEY, META_KEY, AdapterCheckpointIO, CheckpointError, fitting_weights, newest, read_meta, verify

META = {"adapter": "unicon", "backbone": "embedded:sd3_tiny", "backbone_hash": "abc", "images_seen": 64}


def lightning_dict(value: float = 1.0) -> dict:
    return {
        "state_dict": {"copies.w": torch.full((2, 3), value), "head.b": torch.zeros(3)},
        EMA_KEY: {"copies.w": torch.full((2, 3), value / 2), "head.b": torch.zeros(3)},
        META_KEY: dict(META),
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3}]}],
        "global_step": 4,
    }


@pytest.fixture
def saved(tmp_path):
    AdapterCheckpointIO().save_checkpoint(lightning_dict(), tmp_path / "images-000000064")
    return tmp_path / "images-000000064"


def test_round_trip(saved):
    loaded = AdapterCheckpointIO().load_checkpoint(saved)
    assert torch.equal(loaded["state_dict"]["copies.w"], torch.ones(2, 3))
    assert torch.equal(loaded[EMA_KEY]["copies.w"], torch.full((2, 3), 0.5))
    assert loaded["global_step"] == 4
    assert read_meta(saved)["images_seen"] == 64


def test_state_is_readable_without_pickle(saved):
    assert torch.load(saved / "state.pt", weights_only=True)["global_step"] == 4


def test_nothing_half_written_stays_under_the_name(tmp_path, monkeypatch):
    target = tmp_path / "images-000000064"
    AdapterCheckpointIO().save_checkpoint(lightning_dict(1.0), target)
    monkeypatch.setattr("src.checkpoint.torch.save", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        AdapterCheckpointIO().save_checkpoint(lightning_dict(2.0), target)
    monkeypatch.undo()
    verify(target)
    assert torch.equal(load_file(target / "adapter.safetensors")["copies.w"], torch.ones(2, 3))
    assert newest(tmp_path) == target


@pytest.mark.parametrize("file", ["adapter.safetensors", "adapter_ema.safetensors", "state.pt", "meta.json"])
def test_newest_passes_over_a_cut_file(saved, file, capsys):
    later = shutil.copytree(saved, saved.with_name("images-000000128"))
    (later / file).write_bytes((later / file).read_bytes()[:20])
    assert newest(saved.parent) == saved
    assert "images-000000128" in capsys.readouterr().out


def test_a_malicious_state_is_refused(saved):
    class Evil:
        def __reduce__(self):
            return (print, ("pickle ran",))

    torch.save({"global_step": Evil()}, saved / "state.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.?only"):
        AdapterCheckpointIO().load_checkpoint(saved)
    assert newest(saved.parent) is None


def own() -> dict[str, torch.Tensor]:
    return {"copies.w": torch.zeros(2, 3), "head.b": torch.zeros(3)}


def test_fitting_weights_prefers_the_average(saved):
    assert torch.equal(fitting_weights(saved, own(), META)["copies.w"], torch.full((2, 3), 0.5))
    assert torch.equal(fitting_weights(saved, own(), META, ema=False)["copies.w"], torch.ones(2, 3))


@pytest.mark.parametrize(
    ("key", "value"), [("adapter", "unicon_half"), ("backbone", "embedded:pixart_tiny"), ("backbone_hash", "another")]
)
def test_another_method_or_backbone_is_refused_by_name(saved, key, value):
    with pytest.raises(CheckpointError, match=key) as caught:
        fitting_weights(saved, own(), {**META, key: value})
    assert value in str(caught.value)
    assert META[key] in str(caught.value)


def test_other_tensors_are_refused_by_name(saved):
    with pytest.raises(CheckpointError, match=r"1 tensors missing \['stem.w'\]"):
        fitting_weights(saved, {**own(), "stem.w": torch.zeros(1)}, META)
    with pytest.raises(CheckpointError, match=r"copies\.w is \(2, 3\), this adapter's \(4, 3\)"):
        fitting_weights(saved, {**own(), "copies.w": torch.zeros(4, 3)}, META)


def test_another_format_is_refused(saved):
    meta = json.loads((saved / "meta.json").read_text())
    (saved / "meta.json").write_text(json.dumps({**meta, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        read_meta(saved)


def test_a_pickle_named_safetensors_is_refused(saved):
    torch.save({"copies.w": torch.ones(2, 3)}, saved / "adapter.safetensors")
    with pytest.raises(CheckpointError):
        verify(saved)
    save_file({"copies.w": torch.ones(2, 3)}, saved / "adapter.safetensors")
    verify(saved)
