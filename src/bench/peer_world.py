"""What both sides of the comparison with diffusers' script are given: one model folder, and the same pictures in the layout
that each of them wants.

The text encoders are tiny and random, since both sides encode captions before they train; their outputs have the shapes of
the real ones.
"""

import json
import shutil
from pathlib import Path

import torch
from PIL import Image

from src.backbones.source import EMBEDDED_ROOT, SHAPES
from src.config import load
from src.construct import construct
from src.types import UserError

EMBEDDED = "sd3_tiny"
CLIP_TOKENS = 77  # the script pads to it, whatever the tokenizer says
CLIP_HEADS = 2
HELD_OUT = 4  # pictures that our run wants beside those that it trains on
VAE = {  # of the public SD3 models, beside what their shape says
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def model_folder(shape: str, folder: Path, seed: int) -> dict:
    """Write an SD3 in the diffusers layout into `folder`. -> the transformer's configuration.

    shape: "sd3_tiny", the embedded weights, or an SD3 of `shapes.json`, with random ones. Raises UserError for another.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    home = EMBEDDED_ROOT / EMBEDDED
    torch.manual_seed(seed)
    if shape == EMBEDDED:
        for part in ("transformer", "vae", "scheduler"):
            shutil.copytree(home / part, folder / part)
    else:
        _random_networks(shape, folder)
    transformer = json.loads((folder / "transformer" / "config.json").read_text())
    _text_encoders(home, folder, transformer["joint_attention_dim"], transformer["pooled_projection_dim"])
    shutil.copy(home / "model_index.json", folder / "model_index.json")
    return transformer


def _random_networks(shape: str, folder: Path) -> None:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    shapes = json.loads(SHAPES.read_text())
    known = [EMBEDDED, *(name for name, s in shapes.items() if s[""]["_class_name"] == "StableDiffusion3Pipeline")]
    if shape not in known:
        raise UserError(f"shape={shape}: the peer trains SD3 alone; use one of {', '.join(known)}")
    parts = shapes[shape]
    SD3Transformer2DModel.from_config(parts["transformer"]).to(torch.bfloat16).save_pretrained(folder / "transformer")
    AutoencoderKL.from_config({**parts["vae"], **VAE}).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler.from_config(parts["scheduler"]).save_pretrained(folder / "scheduler")


def _text_encoders(home: Path, folder: Path, joint: int, pooled: int) -> None:
    """Both CLIPs and the T5 of the embedded model, with other widths and 77 positions."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    for number in ("", "_2"):
        clip = json.loads((home / f"text_encoder{number}" / "config.json").read_text())
        half = {"hidden_size": joint // 2, "projection_dim": pooled // 2, "intermediate_size": joint // 2}
        clip |= half | {"num_attention_heads": CLIP_HEADS, "max_position_embeddings": CLIP_TOKENS}
        CLIPTextModelWithProjection(CLIPTextConfig(**clip)).save_pretrained(folder / f"text_encoder{number}")
        shutil.copytree(home / f"tokenizer{number}", folder / f"tokenizer{number}")
        file = folder / f"tokenizer{number}" / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": CLIP_TOKENS}))
    t5 = json.loads((home / "text_encoder_3" / "config.json").read_text())
    T5EncoderModel(T5Config(**(t5 | {"d_model": joint}))).save_pretrained(folder / "text_encoder_3")
    shutil.copytree(home / "tokenizer_3", folder / "tokenizer_3")


def smaller_copy(model: Path, blocks: int, folder: Path) -> None:
    """The peer's own initial ControlNet with another number of copied blocks, for its `--controlnet_model_name_or_path`."""
    from diffusers import SD3ControlNetModel, SD3Transformer2DModel

    transformer = SD3Transformer2DModel.from_pretrained(model, subfolder="transformer")
    made = SD3ControlNetModel.from_transformer(transformer, num_layers=blocks, num_extra_conditioning_channels=0)
    made.save_pretrained(folder)


def pictures(folder: Path, count: int, resolution: int, seed: int) -> None:
    """Scenes with captions and edges: `theirs/` as an imagefolder with two image columns, `ours/` as pictures with texts."""
    cfg = load("train", [f"data.world_seed={seed}", f"data.train_images={count + HELD_OUT}", "hardware=cpu"])
    source, task = construct(cfg.data, split="train", resolution=resolution), construct(cfg.task)
    rows = []
    for kind in ("theirs/images", "theirs/conditions", "ours"):
        (folder / kind).mkdir(parents=True)
    for index in range(count + HELD_OUT):
        sample, name = source[index], f"{index:05d}"
        Image.fromarray(sample.image).save(folder / "ours" / f"{name}.png")
        (folder / "ours" / f"{name}.txt").write_text(sample.caption)
        if index < count:
            Image.fromarray(sample.image).save(folder / "theirs" / "images" / f"{name}.png")
            Image.fromarray(task.condition_of(sample, seed)).save(folder / "theirs" / "conditions" / f"{name}.png")
            paths = {"image_file_name": f"images/{name}.png", "conditioning_image_file_name": f"conditions/{name}.png"}
            rows.append(json.dumps(paths | {"text": sample.caption}))
    (folder / "theirs" / "metadata.jsonl").write_text("\n".join(rows) + "\n")
