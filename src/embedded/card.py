"""The model card of an embedded backbone, generated from recipe.json and scores.json in its folder, and its pictures."""

import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from src.plots import plot_grid, plot_loss_curve

GRID, COLUMNS, SCALE = 32, 8, 2  # pictures on the sheet: the first prompts, none left out
QUESTIONS = {  # of `reader.outcomes`, in the order of the table
    "colour": "named thing: its colour is there",
    "shape": "named thing: colour and shape are right",
    **{f"shape/{kind}": f"- {kind}s" for kind in ("ball", "cube", "cylinder", "cone", "person")},
    "floor": "floor is right",
    "scene": "whole scene is right, nothing invented",
}
ARMS = {
    "samples": "samples",
    "renders": "real renders",
    "reconstructions": "reconstructed renders",
    "other_captions": "samples, other captions",
}

TEMPLATE = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# {name}

A Stable Diffusion 3 in miniature: the stock diffusers classes, {total_m:.2f} M parameters, trained from nothing on a world
of procedural scenes, 64 x 64 pixels. ControlBench compares control adapters on it where there is no GPU: it is small
enough for one CPU core, and a caption tells it what is in a scene but never where, so that control has something to add.

Licence: Apache-2.0, weights included. It has seen no photograph and no data of third parties.

![the first {grid} held-out prompts](samples.png)

The first {grid} captions of the held-out world, none left out; {steps} steps, guidance {guidance:g}, seed {seed}.

## Use
```python
from diffusers import StableDiffusion3Pipeline

pipeline = StableDiffusion3Pipeline.from_pretrained("{name}", text_encoder_3=None, tokenizer_3=None)
picture = pipeline(
    "a large red ball and a small blue cube, gray floor",
    height=64, width=64, max_sequence_length=0, num_inference_steps={steps}, guidance_scale={guidance:g},
).images[0]
```
Captions list one to three things and a floor: `{caption}`.
Known words: {words}.

`max_sequence_length` is the number of T5 tokens. The model was trained with none. The T5 in the folder is silent (its output
is zero) and is there because the pipeline class insists on one; many of its tokens draw attention away from the caption:

{tokens_table}

Loading without `text_encoder_3=None, tokenizer_3=None` works too; then pass `max_sequence_length=1`, since the pipeline
cannot cut a T5 prompt to no token at all, and stops with an error at 0.

## Scores
Read by the scene reader (`{reader_hash}`), a network of {reader_k:.0f} k parameters that learned from renders and knows no
model. It takes things bent out of shape, and two things where one is named, for wrong. {n} captions of the held-out world,
one sample each; 95 % intervals over pictures.

{scores_table}

Real renders are the ceiling: what is missing there is the reader's own error, or hidden behind another thing. Samples
against another picture's caption are the floor: what chance alone gives.

{fid_table}

`fid_scenes` is the Frechet distance between {features} features of the scene reader, {n} pictures against {n} renders of other
scenes. It is no Inception FID, and values compare only at equal n and equal reader. No model can expect to beat the line of
the real renders. The autoencoder alone: {psnr:.1f} dB PSNR on {n} held-out renders.

## Recipe
{recipe_table}

Seed {train_seed}; {packages}. CPU seconds are of one thread.
Autoencoder and diffusion model train side by side: the latent space (16 principal components of each 8 x 8 patch) is fixed
before either starts. Everything again, from nothing: `{command}`.

![autoencoder](curve_vae.png)
![diffusion model](curve_backbone.png)

## Limits
- It draws these scenes only: {things}; {colours} colours, {floors} floors. Other words fall apart into letters it never saw.
- Of the shapes, {worst} is the weakest: {worst_share:.0f} % right, against {worst_ceiling:.0f} % for real renders.
- {scene_share:.0f} % of the samples are right in colours, shapes and floor, against {scene_ceiling:.0f} % of the renders.
- Sizes and poses are in the captions, but are not scored above; positions are free by design.
- Results on it say how methods compare on a small rectified-flow transformer; what they say about a large one is open.
"""


def draw_samples(samples: np.ndarray, captions: list[str], out_png: str | Path) -> None:
    """The first `GRID` samples (N, S, S, 3) uint8 on one sheet, each above its caption."""
    cells = [_captioned(p, c) for p, c in zip(samples[:GRID], captions[:GRID], strict=False)]
    rows = [[*cells[i : i + COLUMNS]] for i in range(0, len(cells), COLUMNS)]
    rows[-1] += [None] * (len(rows[0]) - len(rows[-1]))
    plot_grid(rows, [""] * len(rows[0]), out_png, scale=1)


def _captioned(picture: np.ndarray, caption: str) -> np.ndarray:
    """(S, S, 3) -> the picture `SCALE` times as large with four lines of text below it, uint8."""
    large = np.repeat(np.repeat(picture, SCALE, 0), SCALE, 1)
    sheet = Image.new("RGB", (large.shape[1], large.shape[0] + 52), "white")
    sheet.paste(Image.fromarray(large))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=10)
    for i, line in enumerate(textwrap.wrap(caption, 25)[:4]):
        draw.text((1, large.shape[0] + 1 + 12 * i), line, fill="black", font=font)
    return np.array(sheet)


def write_card(folder: Path) -> None:
    """README.md and the curves, from recipe.json, scores.json and samples.png beside them."""
    recipe, scores = (json.loads((folder / name).read_text()) for name in ("recipe.json", "scores.json"))
    vae, backbone = recipe["vae"], recipe["backbone"]
    plot_loss_curve(
        vae["curve"],
        "images_seen",
        ["psnr_db", "map_psnr_db"],
        folder / "curve_vae.png",
        "autoencoder: PSNR on held-out pictures, dB",
    )
    title = "diffusion model: loss on held-out scenes"
    plot_loss_curve(backbone["curve"], "images_seen", ["val_loss", "val_loss_ema"], folder / "curve_backbone.png", title)
    (folder / "README.md").write_text(TEMPLATE.format(**_facts(folder.name, recipe, scores)))


def _facts(name: str, recipe: dict[str, Any], scores: dict[str, Any]) -> dict[str, Any]:
    """Everything that the template names."""
    made, arms, words = scores["conditions"], scores["arms"], recipe["words"]
    kinds = [k for k in QUESTIONS if k.startswith("shape/") and k in arms["samples"]]
    worst = min(kinds, key=lambda k: arms["samples"][k]["value"])
    return {
        "name": name,
        "total_m": sum(recipe["parameters"].values()) / 1e6,
        "grid": min(GRID, made["n"]),
        **{key: made[key] for key in ("n", "seed", "steps", "guidance")},
        "caption": recipe["example_caption"],
        "words": ", ".join(w for group in words.values() for w in group),
        "things": ", ".join(words["things"]),
        "colours": len(words["colours"]),
        "floors": len(words["floors"]),
        "tokens_table": _tokens_table(scores["t5_tokens"]),
        "reader_hash": scores["reader"]["hash"],
        "reader_k": scores["reader"]["parameters"] / 1e3,
        "features": scores["reader"]["features"],
        "scores_table": _scores_table(arms),
        "fid_table": _fid_table(scores["fid_scenes"]),
        "psnr": scores["vae_psnr_db"],
        "recipe_table": _recipe_table(recipe),
        "train_seed": recipe["seed"],
        "packages": ", ".join(f"{k} {v}" for k, v in recipe["versions"].items()),
        "command": recipe["command"],
        "worst": worst.removeprefix("shape/"),
        "worst_share": 100 * arms["samples"][worst]["value"],
        "worst_ceiling": 100 * arms["renders"][worst]["value"],
        "scene_share": 100 * arms["samples"]["scene"]["value"],
        "scene_ceiling": 100 * arms["renders"]["scene"]["value"],
    }


def _scores_table(arms: dict[str, Any]) -> str:
    lines = ["| share in % | asked | " + " | ".join(ARMS.values()) + " |", "| --- | --- |" + " --- |" * len(ARMS)]
    for key, meaning in QUESTIONS.items():
        if key in arms["samples"]:
            cells = [_percent(arms[arm].get(key)) for arm in ARMS]
            lines.append(f"| {meaning} | {arms['samples'][key]['asked']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _percent(entry: dict[str, Any] | None) -> str:
    """A share as `value (low to high)`; the basic interval may leave 0..100, which no share does."""
    if entry is None:
        return "-"
    if not entry["ci95"]:
        return f"{100 * entry['value']:.1f}"
    low, high = (100 * min(1, max(0, bound)) for bound in entry["ci95"])
    return f"{100 * entry['value']:.1f} ({low:.1f} to {high:.1f})"


def _tokens_table(by_tokens: dict[str, Any]) -> str:
    lines = [
        "| max_sequence_length | colour there, % | colour and shape right, % | floor right, % | CPU s per picture |",
        "| --- |" + " --- |" * 4,
    ]
    for tokens, entry in by_tokens.items():
        note = {"0": "0, as trained", "256": "256, the pipeline's default"}.get(tokens, tokens)
        cells = [f"{100 * entry[k]['value']:.1f}" for k in ("colour", "shape", "floor")]
        lines.append(f"| {note} | {' | '.join(cells)} | {entry['cpu_s_per_image']:.2f} |")
    first = next(iter(by_tokens.values()))
    return "\n".join(
        [
            *lines,
            "",
            f"(the first {first['floor']['n']} prompts, {first['colour']['asked']} things, the same noise in all rows)",
        ]
    )


def _fid_table(fid: dict[str, Any]) -> str:
    lines = ["| pictures | fid_scenes |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {ARMS[arm]} | {fid[arm]:.3f} |" for arm in ("samples", "reconstructions", "renders"))])


def _recipe_table(recipe: dict[str, Any]) -> str:
    """One column per trained part."""
    vae, net, size = recipe["vae"], recipe["backbone"], recipe["parameters"]
    last_vae, last_net = vae["curve"][-1], net["curve"][-1]
    rows = [
        ("", "autoencoder", "transformer and two text encoders"),
        ("---", "---", "---"),
        ("parameters", f"{size['vae']:,}", f"{size['transformer']:,} + 2 x {size['text_encoder']:,}"),
        (
            "learned from",
            f"{recipe['renders']:,} renders, {recipe['maps']:,} control maps",
            f"{recipe['renders']:,} renders and captions",
        ),
        ("steps x batch", f"{vae['steps']:,} x {vae['batch']}", f"{net['steps']:,} x {net['batch']}"),
        ("peak learning rate", f"{vae['lr']:g}", f"{net['lr']:g}"),
        ("moving average", "none", f"{net['ema_decay']:g} per step"),
        ("CPU seconds", f"{last_vae['cpu_s']:,.0f}", f"{last_net['cpu_s']:,.0f}"),
        (
            "at the end, held out",
            f"{last_vae['psnr_db']:.1f} dB, maps {last_vae['map_psnr_db']:.1f} dB",
            f"loss {last_net['val_loss_ema']:.4f}",
        ),
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
