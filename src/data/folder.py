"""A folder of images with captions: `picture.jpg` beside `picture.txt`."""

import hashlib
from pathlib import Path

import cv2
import numpy as np

from src.data.source import Source, Split
from src.types import Sample, UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class FolderSource(Source):
    """Images below `path`, in the order of their names; the last `val_images` of them are held out.

    Every image is turned upright (EXIF), laid over white where transparent, scaled so that its short side is
    `resolution`, and cropped in the middle. Grayscale becomes three channels.
    """

    def __init__(self, name: str, path: str, val_images: int, split: Split, resolution: int):
        self.name, self.root, self.resolution = name, Path(path).expanduser(), resolution
        if not self.root.is_dir():
            raise UserError(f"data.path={path!r} is not a folder")
        found = sorted(p for p in self.root.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not found:
            seen = sorted({p.suffix for p in self.root.rglob("*") if p.is_file()})
            raise UserError(f"data.path={path!r} holds no image ({', '.join(SUFFIXES)}); its files end in {seen}")
        if len(found) <= val_images:
            raise UserError(
                f"data.path={path!r} holds {len(found)} images, and data.val_images={val_images} leaves none to train on"
            )
        bare = [p.name for p in found if not p.with_suffix(".txt").is_file()]
        if bare:
            raise UserError(
                f"{len(bare)} of {len(found)} images below {path!r} have no caption file beside them (.txt): {bare[:10]}"
            )
        self.files = found[:-val_images] if split == "train" else found[-val_images:]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        name, caption = self.describe(index)
        return Sample(id=name, image=read_picture(self.files[index], self.resolution), caption=caption)

    def describe(self, index: int) -> tuple[str, str]:
        file = self.files[index]
        return str(file.relative_to(self.root)), file.with_suffix(".txt").read_text(encoding="utf-8").strip()

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=8)
        for file in self.files:
            for f in (file, file.with_suffix(".txt")):
                stat = f.stat()
                digest.update(f"{f.relative_to(self.root)}|{stat.st_size}|{stat.st_mtime_ns}\n".encode())
        return f"folder-{digest.hexdigest()}-{self.resolution}px-n{len(self.files)}"


def read_picture(file: Path, resolution: int) -> np.ndarray:
    """-> (resolution, resolution, 3) uint8. Raises UserError, naming the file, where it cannot be decoded whole."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            opened.load()  # a half JPEG passes open() and verify(); only load() finds it
            upright = ImageOps.exif_transpose(opened)
            if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
                rgba = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            image = np.asarray(upright.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{file}: not a whole image ({error}); mend or remove it") from error
    scale = resolution / min(image.shape[:2])
    if scale != 1:
        height, width = (max(resolution, round(s * scale)) for s in image.shape[:2])
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    top, left = ((s - resolution) // 2 for s in image.shape[:2])
    return np.ascontiguousarray(image[top : top + resolution, left : left + resolution])
