"""The rules by which a file becomes a picture of 8-bit sRGB. What cannot be read by them is a `BadSample`, never a black one.

- Turned upright by its EXIF orientation; as it stands where the EXIF cannot be read, told once.
- Alpha, also a palette's, is laid over `matte`; hidden colours under transparent pixels do not show.
- An ICC profile other than sRGB is converted to sRGB, perceptual intent; one that fails is told once and left aside.
  CMYK and other modes without a profile are converted by Pillow's plain formula.
- Gray and black-and-white become three equal channels.
- 16 bits per channel: the high byte. Float (one channel): 0..1 is black to white, or 0..255 where it goes beyond 1.
- Animations and files of several pages: the first frame, told once per format.
- Read whole: a file that ends too early is bad, also where a decoder would fill the rest with gray.
- At most 150 megapixels, against files that unpack to more than memory holds; no side below 4 pixels; no side more than
  20 times the other.
"""

import contextlib
import functools
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageColor, ImageOps

from src.data.source import BadSample, note_once
from src.types import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
MAX_MEGAPIXELS = 150
MIN_SIDE = 4
MAX_ASPECT = 20
MEND = "mend or remove it"
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
UNLIKE_PICTURES = (  # how a file begins -> what it is, and what to do about it
    (b"<!doctype", "a web page", "download it again"),
    (b"<html", "a web page", "download it again"),
    (b"<svg", "a vector drawing", "render it to PNG"),
    (b"<?xml", "XML text", "download it again, or render it to PNG"),
    (b"version https://git-lfs", "a pointer of git LFS", "run `git lfs pull`"),
    (b"{", "JSON text", "download it again"),
    (b"%pdf", "a PDF", "render it to PNG"),
)
Raw = Path | bytes  # a file as it stands: its path, or its bytes


@dataclass(frozen=True)
class Header:
    """What a picture's first bytes tell. height, width: pixels, turned upright; kind: format and mode, as "JPEG RGB"."""

    height: int
    width: int
    kind: str


def check_matte(matte: str) -> None:
    """Refuse a word that is no colour. Raises UserError."""
    try:
        ImageColor.getrgb(matte)
    except ValueError as error:
        raise UserError(f"data.matte={matte!r} is not a colour; write a name such as white, or #rrggbb") from error


def header(raw: Raw, name: str) -> Header:
    """Size and kind of a picture, without decoding it. name: how messages call it. Raises BadSample."""
    with opened(raw, name) as image:
        return header_of(image, name)


def read_rgb(raw: Raw, name: str, matte: str = "white") -> np.ndarray:
    """-> (height, width, 3) uint8, by the rules of this module. Raises BadSample with `name`, the reason and a fix."""
    with opened(raw, name) as image:
        header_of(image, name)
        return np.ascontiguousarray(_as_rgb(upright(image, name), name, matte))


@contextlib.contextmanager
def opened(raw: Raw, name: str) -> Iterator[Image.Image]:
    """Pillow's image of a file, not decoded yet; whatever goes wrong inside of the block becomes a BadSample."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is MAX_MEGAPIXELS
            with Image.open(raw if isinstance(raw, Path) else io.BytesIO(raw)) as image:
                yield image
    except (BadSample, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise too_large(name, f"{error}".partition(" exceeds")[0].removeprefix("Image size ").strip("()")) from error
    except Exception as error:  # Pillow's decoders raise almost anything on a damaged file
        raise BadSample(name, *diagnosis(raw, error)) from error


def too_large(name: str, found: str) -> BadSample:
    """The refusal of a picture beyond MAX_MEGAPIXELS. found: its size in words."""
    return BadSample(name, f"{found}, more than {MAX_MEGAPIXELS} megapixels", "scale it down, or remove it")


def diagnosis(raw: Raw, error: Exception) -> tuple[str, str]:
    """(reason, fix) of a file that could not be read: what it is, as far as its first bytes tell."""
    try:
        head = first_bytes(raw)
    except OSError as why:
        gone = isinstance(why, FileNotFoundError) and isinstance(raw, Path) and raw.is_symlink()
        reason = "a link that leads nowhere" if gone else f"cannot be opened ({why.strerror or why})"
        return reason, "check its permissions and links, or remove it"
    if not head:
        return "empty, 0 bytes", "download it again or remove it"
    start = head.lstrip().lower()
    for begin, what, fix in UNLIKE_PICTURES:
        if start.startswith(begin):
            return f"{what}, not a picture; it begins with {head[:20].decode(errors='replace').strip()!r}", fix
    if b"ftyphei" in head or b"ftypmif1" in head:
        return "HEIC, which is not read here", "convert it to JPEG or PNG"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture of a known format", f"give one of {', '.join(s[1:] for s in SUFFIXES)}"
    return f"not whole ({' '.join(str(error).split()) or type(error).__name__})", MEND


def first_bytes(raw: Raw) -> bytes:
    """The first 64 bytes of a file. Raises OSError."""
    if not isinstance(raw, Path):
        return raw[:64]
    with raw.open("rb") as file:
        return file.read(64)


def header_of(image: Image.Image, name: str) -> Header:
    """Size and kind of an opened picture, within the limits of this module. Raises BadSample."""
    width, height = image.size
    if width * height > MAX_MEGAPIXELS * 1e6:
        raise too_large(name, f"{width} x {height} pixels")
    if min(width, height) < MIN_SIDE:
        raise BadSample(name, f"{width} x {height} pixels, less than {MIN_SIDE} on a side", "remove it")
    if max(width, height) > MAX_ASPECT * min(width, height):
        reason = f"{width} x {height} pixels, one side more than {MAX_ASPECT} times the other"
        raise BadSample(name, reason, "cut it into pieces, or remove it")
    if _is_sideways(image, name):
        width, height = height, width
    return Header(height, width, f"{image.format} {image.mode}")


def _is_sideways(image: Image.Image, name: str) -> bool:
    try:
        if image.format == "PNG":  # its getexif() decodes the whole picture
            exif = Image.Exif()
            exif.load(image.info.get("exif"))
        else:
            exif = image.getexif()
        return exif.get(ExifTags.Base.Orientation) in SIDEWAYS
    except Exception as error:  # whatever a parser meets in damaged notes; the picture may be whole
        note_once("exif", f"{name}: its EXIF cannot be read ({error}); it is taken as upright, as are all such files")
        return False


def upright(image: Image.Image, name: str) -> Image.Image:
    """The first frame, decoded whole and turned upright."""
    frames = image.format != "MPO" and getattr(image, "is_animated", False)  # MPO is a photograph with a preview
    if frames:
        line = f"{image.format} files of several frames, such as {name}, are read by their first frame"
        note_once(f"frames {image.format}", line)
        image.seek(0)
    image.load()  # a half JPEG passes open() and verify(); only load() finds it
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF that cannot be read, of which `_is_sideways` has told
        return image


def _as_rgb(image: Image.Image, name: str, matte: str) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        image, profile = _deep_to_gray(image, name), None
    elif image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.mode == "PA" or "transparency" in image.info else "RGB")
    elif image.mode == "1":
        image = image.convert("L")
    alpha = None
    if image.mode in ("RGBA", "LA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    colour = _to_srgb(image.convert("RGB") if alpha else image, profile, name)
    if alpha:
        colour.putalpha(alpha)
        colour = Image.alpha_composite(Image.new("RGBA", colour.size, matte), colour).convert("RGB")
    return colour


def _deep_to_gray(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image)
    low, high = (values.min(), values.max()) if np.isfinite(values).all() else (np.nan, np.nan)
    if image.mode == "F" and low >= 0 and high <= 255:
        return Image.fromarray(np.round(values * (255 if high <= 1 else 1)).astype(np.uint8))
    if image.mode != "F" and low >= 0 and high <= 65535:
        return Image.fromarray((values.astype(np.int64) >> 8).astype(np.uint8))
    wanted = "0..1 or 0..255" if image.mode == "F" else "0..65535"
    raise BadSample(name, f"a picture with values of {low:g}..{high:g}, not {wanted}", f"scale its values to {wanted}")


def _to_srgb(image: Image.Image, profile: bytes | None, name: str) -> Image.Image:
    """-> mode RGB. An unusable profile is left aside with one line."""
    if profile:
        try:
            transform = _transform(profile, image.mode)
            return ImageCms.applyTransform(image, transform) if transform else image.convert("RGB")
        except (ImageCms.PyCMSError, OSError, ValueError) as error:
            why = " ".join(str(error).split())
            line = f"{name}: its ICC profile cannot be used ({why}); its colours are read without it, as of all such files"
            note_once("icc", line)
    return image.convert("RGB")


@functools.lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None where it is sRGB already."""
    given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if mode == "RGB" and "srgb" in ImageCms.getProfileDescription(given).lower():
        return None
    return ImageCms.buildTransform(given, ImageCms.createProfile("sRGB"), mode, "RGB", ImageCms.Intent.PERCEPTUAL)
