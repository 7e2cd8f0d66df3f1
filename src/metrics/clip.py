"""What CLIP says of pictures: how well each fits its caption, and how good it looks.

clip_score: 100 max(0, cosine of picture and caption) (Hessel et al. 2021, 2104.08718, Eq. 1, with w = 100 and not 2.5).
clip_iqa: probability of the first of two opposite prompts, by the model's own temperature (Wang, Chan and Loy 2022,
2207.12396, Eq. 3), in `PROMPTS`. The paper takes the position embedding out of a ResNet to read every size; here the model
is used as it is, at its own size, so values compare with each other and with no printed ones.
Both depend on the model: its hash is in `settings`. Legend: B batch, E width of CLIP's common space.
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from src.hub import answers, hub_fault
from src.metrics.extractors import Pictures, full_precision
from src.metrics.intervals import Better
from src.types import UserError

SETTING = "metrics.clip"
PROMPTS = {  # metric -> what is good, what is not
    "clip_iqa": ("Good photo.", "Bad photo."),
    "clip_iqa_sharpness": ("Sharp photo.", "Blurry photo."),
    "clip_iqa_cleanness": ("Clean photo.", "Noisy photo."),
}
FILES = ("*.json", "*.txt", "*.safetensors")  # of a model folder: configurations, vocabulary, weights


class ClipScores:
    """clip_score and the clip_iqa of `PROMPTS`. source: a folder as `save_pretrained` writes it (model, tokenizer and image
    processor), or a hub id, owner/name or owner/name@revision.

    A folder never contacts the hub. Raises UserError, before weights are read, for a model that cannot be had.
    """

    metrics: ClassVar[dict[str, tuple[str, Better]]] = {
        "clip_score": ("100 cosine", "higher"),
        **dict.fromkeys(PROMPTS, ("probability", "higher")),
    }
    needs_original = False

    def __init__(self, source: str, device: str = "cpu"):
        self.source, self.device = source, device
        self.folder = _folder(source)
        config = self._config("config.json")
        if config.get("model_type") != "clip":
            raise UserError(f"{SETTING}={source!r} is of the type {config.get('model_type')!r}, not a CLIP model")
        self._config("preprocessor_config.json")
        self.described = f"CLIP of {source}, {self.hash[:8]}"

    def settings(self) -> dict[str, Any]:
        """Everything that changes a score."""
        return {"clip": self.folder.name, "hash": self.hash, "prompts": {k: list(v) for k, v in PROMPTS.items()}}

    @cached_property
    def hash(self) -> str:
        """16 hex digits over all files of the model."""
        digest = hashlib.blake2b(digest_size=8)
        for file in sorted(f for pattern in FILES for f in self.folder.glob(pattern)):
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    def score(self, pictures: Pictures, captions: list[str], originals: Pictures | None) -> dict[str, np.ndarray]:
        """B pictures (H, W, 3) uint8 and their captions -> (B,) float64 of each metric. Captions are cut at CLIP's length."""
        import torch

        model, _, processor = self._loaded
        with torch.no_grad(), full_precision(self.device):
            pixels = processor(images=pictures, return_tensors="pt")["pixel_values"].to(self.device)
            image_BE = _unit(model.get_image_features(pixel_values=pixels).pooler_output)
            text_BE = self._words(captions)
            fits = (image_BE * text_BE).sum(1).clamp(min=0) * 100
            anchors = self._words([prompt for pair in PROMPTS.values() for prompt in pair])
            logits = image_BE @ anchors.T * model.logit_scale.exp()
            chances = logits.unflatten(1, (len(PROMPTS), 2)).double().softmax(-1)[..., 0]
        scores = {"clip_score": fits, **dict(zip(PROMPTS, chances.T, strict=True))}
        return {name: x.double().cpu().numpy() for name, x in scores.items()}

    def _words(self, texts: list[str]) -> Any:
        model, tokenizer, _ = self._loaded
        longest = model.config.text_config.max_position_embeddings
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt").to(self.device)
        inputs = {key: tokens[key] for key in ("input_ids", "attention_mask")}
        return _unit(model.get_text_features(**inputs).pooler_output)

    @cached_property
    def _loaded(self) -> tuple[Any, Any, Any]:
        """-> model, tokenizer, image processor: Pillow's, which does not change with the version of torchvision."""
        import transformers
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        try:
            model, found = transformers.CLIPModel.from_pretrained(
                self.folder, local_files_only=True, output_loading_info=True, dtype="float32", use_safetensors=True
            )
            tokenizer = transformers.CLIPTokenizer.from_pretrained(self.folder, local_files_only=True)
            processor = CLIPImageProcessorPil.from_pretrained(self.folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{SETTING}={self.source!r} cannot be loaded: {str(error).splitlines()[0]}") from error
        if found["missing_keys"]:  # transformers would fill them with random numbers
            raise UserError(f"{SETTING}={self.source!r} lacks weights: {sorted(found['missing_keys'])[:3]}; copy it whole")
        return model.to(self.device).eval(), tokenizer, processor

    def _config(self, name: str) -> dict[str, Any]:
        file = self.folder / name
        if not file.is_file():
            raise UserError(
                f"{SETTING}={self.source!r} has no {name}: save model, tokenizer and image processor there with save_pretrained"
            )
        return json.loads(file.read_text())


def _folder(source: str) -> Path:
    """The model's folder; from the hub with its weights, since its download is one step. Raises UserError."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not list(folder.glob("*.safetensors")):
            raise UserError(f"{SETTING}={source!r} holds no weights (*.safetensors): copy the whole model, or save it again")
        return folder
    name, _, revision = source.partition("@")
    if source.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"{SETTING}={source!r} is no folder and no hub id of the form owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(name, revision=revision or None, allow_patterns=list(FILES), local_files_only=not answers())
        )
    except Exception as error:
        fault = hub_fault(error)
        if fault is None:
            raise
        said = {
            "gated": "is gated: accept its licence on its page, then run `hf auth login` or set HF_TOKEN",
            "revision": "has no such revision: leave out what follows the @",
            "missing": "is not on the hub, or is private: check the spelling, then `hf auth login` or HF_TOKEN",
            "layout": "is no model of transformers",
            "unreachable": f"is not cached here and the hub cannot be reached ({type(error).__name__}): download it on a "
            f"machine with a network (`hf download {name}`) and name that folder, or write null",
        }
        raise UserError(f"{SETTING}={source!r} {said[fault]}") from error


def _unit(x_BE: Any) -> Any:
    return x_BE / x_BE.norm(dim=-1, keepdim=True)
