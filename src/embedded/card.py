"""The model card of an embedded backbone, generated from recipe.json and scores.json in its folder, and its pictures."""

import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from src.embedded.card_words import AGAIN, TEMPLATE, WORDS
from src.embedded.families import FAMILIES, VAE_OWNER, Family, of_folder
from src.embedded.reader import SIZE
from src.embedded.score import PADDINGS
from src.embedded.text import TEXT_TOKENS
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
    (folder / "README.md").write_text(TEMPLATE.format(**_facts(folder, recipe, scores)))


def snippet(folder_name: str, family: Family, steps: int, guidance: float) -> str:
    """Python that draws one picture with the stock pipeline of a folder, seen from the folder beside it."""
    load, call = ("".join(f", {key}={value!r}" for key, value in some.items()) for some in (family.load, family.call))
    return f"""from diffusers import {family.pipeline.__name__}

pipeline = {family.pipeline.__name__}.from_pretrained("{folder_name}"{load})
picture = pipeline(
    "a large red ball and a small blue cube, gray floor",
    height={SIZE}, width={SIZE}{call}, num_inference_steps={steps}, guidance_scale={guidance:g},
).images[0]"""


def _facts(folder: Path, recipe: dict[str, Any], scores: dict[str, Any]) -> dict[str, Any]:
    """Everything that the template names."""
    made, arms, words = scores["conditions"], scores["arms"], recipe["words"]
    name = of_folder(folder)
    own = WORDS[name]
    kinds = [k for k in QUESTIONS if k.startswith("shape/") and k in arms["samples"]]
    worst = min(kinds, key=lambda k: arms["samples"][k]["value"])
    return {
        "name": folder.name,
        **{"kind": own.kind, "network": own.network, "sort": own.sort},
        "snippet": snippet(folder.name, FAMILIES[name], made["steps"], made["guidance"]),
        "total_m": sum(recipe["parameters"].values()) / 1e6,
        "grid": min(GRID, made["n"]),
        **{key: made[key] for key in ("n", "seed", "steps", "guidance")},
        "caption": recipe["example_caption"],
        "words": ", ".join(w for group in words.values() for w in group),
        "things": ", ".join(words["things"]),
        "colours": len(words["colours"]),
        "floors": len(words["floors"]),
        "use": own.use.format(**_use_facts(scores)),
        "reader_hash": scores["reader"]["hash"],
        "reader_k": scores["reader"]["parameters"] / 1e3,
        "features": scores["reader"]["features"],
        "scores_table": _scores_table(arms),
        "fid_table": _fid_table(scores["fid_scenes"]),
        "psnr": scores["vae_psnr_db"],
        "recipe_table": _recipe_table(recipe, own.column, own.learned),
        "train_seed": recipe["seed"],
        "packages": ", ".join(f"{k} {v}" for k, v in recipe["versions"].items()),
        "again": _again(name, recipe),
        "worst": worst.removeprefix("shape/"),
        "worst_share": 100 * arms["samples"][worst]["value"],
        "worst_ceiling": 100 * arms["renders"][worst]["value"],
        "scene_share": 100 * arms["samples"]["scene"]["value"],
        "scene_ceiling": 100 * arms["renders"]["scene"]["value"],
    }


def _use_facts(scores: dict[str, Any]) -> dict[str, Any]:
    """What `Words.use` names: of the comparison that was made for this family, if any."""
    facts: dict[str, Any] = {"text_tokens": TEXT_TOKENS}
    if "t5_tokens" in scores:
        facts["tokens_table"] = _tokens_table(scores["t5_tokens"])
    if "padding" in scores:
        trained_s, default_s = (scores["padding"]["cpu_s_per_image"][str(tokens)] for tokens in PADDINGS)
        facts |= {"default_tokens": PADDINGS[1], "trained_s": trained_s, "default_s": default_s}
        facts |= {"padding_n": scores["padding"]["n"], "apart": scores["padding"]["largest_difference"]}
    return facts


def _again(name: str, recipe: dict[str, Any]) -> str:
    """How to make it again, and whose autoencoder it holds."""
    same_as = recipe["vae"].get("same_as")
    whose = "first" if name == VAE_OWNER else "shared" if same_as else "own"
    return AGAIN[whose].format(command=recipe["command"], same_as=same_as, vae_steps=recipe["vae"]["steps"])


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


def _recipe_table(recipe: dict[str, Any], column: str, learned: tuple[tuple[str, int], ...]) -> str:
    """One column for the autoencoder, one for the diffusion model: its head, and its trained parts with their numbers."""
    vae, net, size = recipe["vae"], recipe["backbone"], recipe["parameters"]
    last_vae, last_net = vae["curve"][-1], net["curve"][-1]
    sizes = " + ".join(f"{f'{count} x ' if count > 1 else ''}{size[part]:,}" for part, count in learned)
    restarts = "".join(f", rate restarted at {step:,}" for step in net.get("restarts", []))
    rows = [
        ("", "autoencoder", column),
        ("---", "---", "---"),
        ("parameters", f"{size['vae']:,}", sizes),
        (
            "learned from",
            f"{vae.get('renders', recipe['renders']):,} renders, {vae.get('maps', recipe['maps']):,} control maps",
            f"{recipe['renders']:,} renders and captions",
        ),
        ("steps x batch", f"{vae['steps']:,} x {vae['batch']}", f"{net['steps']:,} x {net['batch']}{restarts}"),
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
