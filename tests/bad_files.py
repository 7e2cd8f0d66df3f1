"""Pictures and captions as people really have them: a tree of good ones in every format, and at least one bad file per kind.

`GOOD` and `BAD` list what stands in the trees and what must become of it; they write the same bytes every time.
"""

import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

TURNED = 6  # EXIF orientation: stored a quarter turn counter-clockwise
P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))  # XYZ of red, green, blue, D50


@dataclass(frozen=True)
class Case:
    """One file. row: of the list of bad inputs that it stands for; said: what a refusal must say, None where it is read."""

    name: str
    row: int
    said: str | None
    make: Callable[[Path], None]


def photo(i: int, height: int = 48, width: int = 64) -> np.ndarray:
    """(height, width, 3) uint8: a smooth picture with an edge, another for each i."""
    rng = np.random.default_rng(i)
    rows, columns = np.mgrid[:height, :width] / max(height, width)
    colour, slope = rng.uniform(60, 190, 3), rng.uniform(-60, 60, (2, 3))
    made = colour + rows[..., None] * slope[0] + columns[..., None] * slope[1]
    made[rng.integers(height // 4, height // 2) :, rng.integers(width // 4, width // 2) :] += 40
    return np.clip(made, 0, 255).astype(np.uint8)


def encoded(image: Image.Image | np.ndarray, form: str, **options: object) -> bytes:
    """The bytes of a file."""
    stream = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(stream, form, **options)
    return stream.getvalue()


def turned_jpeg(pixels: np.ndarray) -> bytes:
    """A JPEG that stands upright only by its EXIF, as a telephone writes it."""
    exif = Image.Exif()
    exif[0x0112] = TURNED
    return encoded(np.rot90(pixels), "JPEG", exif=exif, quality=95)


def wide_gamut_profile(gamma: float = 2.2) -> bytes:
    """A minimal ICC profile (version 2.1, matrix and curves): the primaries of Display P3."""

    def xyz(values: tuple[float, float, float]) -> bytes:
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in values))

    text = b"wide gamut\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": xyz((0.9642, 1.0, 0.8249)),
        **{name: xyz(p) for name, p in zip((b"rXYZ", b"gXYZ", b"bXYZ"), P3, strict=True)},
        **{name: b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) for name in (b"rTRC", b"gTRC", b"bTRC")},
    }
    table, data, offset = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, body in tags.items():
        table += name + struct.pack(">II", offset + len(data), len(body))
        data += body + bytes(-len(body) % 4)
    head = struct.pack(">I4sI4s4s4s", offset + len(data), b"none", 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    head += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + table + data


def frames(i: int, form: str) -> bytes:
    """An animation of three pictures."""
    first, *rest = (Image.fromarray(photo(i + k)) for k in range(3))
    return encoded(first, form, save_all=True, append_images=rest)


def clear(i: int, mode: str) -> Image.Image:
    """A picture with a hidden colour: its left half is transparent, and magenta below."""
    rgba = np.dstack([photo(i), np.full((48, 64), 255, np.uint8)])
    rgba[:, :32] = (255, 0, 255, 0)
    image = Image.fromarray(rgba)
    if mode != "P":
        return image.convert(mode)
    flat = Image.fromarray((photo(i)[..., 0] // 64 + 1).astype(np.uint8)).convert("P")
    flat.putpalette([255, 0, 255, *(v for k in range(255) for v in (k, 80, 120))])
    flat.paste(0, (0, 0, 32, 48))
    flat.info["transparency"] = 0
    return flat


def _bytes(make: Callable[[], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(make())


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _nowhere(path: Path) -> None:
    path.symlink_to("not-there.png")


def _png(i: int) -> bytes:
    return encoded(photo(i), "PNG")


# names with what they hold -> read by a rule of src/data/picture.py
GOOD_FORMS: dict[str, Callable[[int], bytes]] = {
    "rgb.png": _png,
    "photo.jpg": lambda i: encoded(photo(i), "JPEG", quality=92),
    "photo.JPEG": lambda i: encoded(photo(i), "JPEG", quality=80),
    "lossy.webp": lambda i: encoded(photo(i), "WEBP", quality=90),
    "palette.gif": lambda i: encoded(Image.fromarray(photo(i)).quantize(64), "GIF"),
    "plain.bmp": lambda i: encoded(photo(i), "BMP"),
    "plain.tif": lambda i: encoded(photo(i), "TIFF"),
    "alpha.png": lambda i: encoded(clear(i, "RGBA"), "PNG"),
    "gray_alpha.png": lambda i: encoded(clear(i, "LA"), "PNG"),
    "palette_alpha.png": lambda i: encoded(clear(i, "P"), "PNG", transparency=0),
    "gray.png": lambda i: encoded(photo(i)[..., 0], "PNG"),
    "black_white.png": lambda i: encoded(Image.fromarray(photo(i)).convert("1"), "PNG"),
    "print.jpg": lambda i: encoded(Image.fromarray(photo(i)).convert("CMYK"), "JPEG"),
    "deep_gray.png": lambda i: encoded(photo(i)[..., 0].astype(np.uint16) * 257, "PNG"),
    "wide_gamut.png": lambda i: encoded(photo(i), "PNG", icc_profile=wide_gamut_profile()),
    "turned.jpg": lambda i: turned_jpeg(photo(i)),
}
LONG = " ".join(f"word{i}" for i in range(500))
CAPTIONS = (
    "a red ball",
    "ein großer Würfel",
    "赤い円柱と青い球",
    "كرة حمراء",
    "шар и куб",
    "cafe\u0301 noir",
    LONG,
    "crlf\r\nand more\r\n",
)


def _huge(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be large, as bombs do."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def _half(form: str, height: int, width: int) -> bytes:
    raw = encoded(photo(1, height, width), form)
    return raw[: len(raw) // 2]


def _negative() -> bytes:
    return encoded(photo(6)[..., 0].astype(np.float32) - photo(6)[..., 0].min() - 5, "TIFF")


def _strip(width: int, height: int) -> bytes:
    return encoded(np.broadcast_to((np.arange(width) * 255 // width).astype(np.uint8), (height, width)).copy(), "PNG")


PAGE = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)
BAD = (
    Case("half.jpg", 11, "not whole", _bytes(lambda: _half("JPEG", 400, 400))),
    Case("cut.png", 11, "not whole", _bytes(lambda: _png(2)[:-300])),
    Case("short.webp", 11, "not whole|not a picture", _bytes(lambda: encoded(photo(3, 200, 200), "WEBP")[:-200])),
    Case("stub.gif", 11, "not whole", _bytes(lambda: encoded(Image.fromarray(photo(4)).quantize(64), "GIF")[:-600])),
    Case("empty.jpg", 11, "empty, 0 bytes", _bytes(lambda: b"")),
    Case("page.jpg", 11, r"a web page.*begins with '<!DOCTYPE", _bytes(lambda: PAGE)),
    Case("pointer.png", 11, "git lfs pull", _bytes(lambda: POINTER)),
    Case("telephone.jpg", 11, "HEIC", _bytes(lambda: HEIC)),
    Case("random.png", 11, "not a picture of a known format", _bytes(lambda: bytes(range(256)))),
    Case("dot.png", 14, "1 x 1 pixels, less than 4", _bytes(lambda: encoded(np.zeros((1, 1, 3), np.uint8), "PNG"))),
    Case("ribbon.png", 11, "20000 x 8 pixels, one side more than 20 times", _bytes(lambda: _strip(20000, 8))),
    Case("bomb.png", 11, "more than 150 megapixels", _bytes(lambda: _huge(20000, 20000))),
    Case("poster.png", 11, "16000 x 10000 pixels, more than 150 megapixels", _bytes(lambda: _huge(16000, 10000))),
    Case("loop.png", 11, "cannot be opened", _loop),
    Case("nowhere.png", 11, "a link that leads nowhere", _nowhere),
    Case("negative.tif", 9, r"values of -5\.\.\d+, not 0\.\.1", _bytes(_negative)),
)
ODD = (  # odd, and read by a stated rule
    Case("animated.gif", 8, None, _bytes(lambda: frames(10, "GIF"))),
    Case("moving.webp", 8, None, _bytes(lambda: frames(13, "WEBP"))),
    Case("broken_profile.png", 8, None, _bytes(lambda: encoded(photo(20), "PNG", icc_profile=b"no profile at all" * 20))),
    Case("broken_exif.jpg", 10, None, _bytes(lambda: encoded(photo(24), "JPEG", exif=b"Exif\0\0no notes at all"))),
    Case("small.png", 14, None, _bytes(lambda: encoded(photo(21, 12, 16), "PNG"))),
    Case("wide.png", 11, None, _bytes(lambda: _strip(20000, 1000))),
    Case("float_unit.tif", 9, None, _bytes(lambda: encoded(photo(23)[..., 0].astype(np.float32) / 255, "TIFF"))),
)


def write_cases(root: Path, cases: tuple[Case, ...]) -> Path:
    """Every case with a caption beside it."""
    root.mkdir(parents=True, exist_ok=True)
    for case in cases:
        case.make(root / case.name)
        (root / case.name).with_suffix(".txt").write_text(f"picture {case.name}", encoding="utf-8")
    return root


def depth_of(i: int) -> np.ndarray:
    """(48, 64) float32: what stands in the depth maps of the good tree."""
    return (photo(i).astype(np.float32).mean(2) * 100 + i).round()


def depth_bytes(i: int) -> tuple[bytes, str]:
    """A depth map as 16-bit PNG, float TIFF or .npy, with its suffix."""
    values = depth_of(i)
    if i % 3 == 0:
        return encoded(values.astype(np.uint16), "PNG"), "png"
    if i % 3 == 1:
        return encoded(values, "TIFF"), "tif"
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue(), "npy"


def edges_of(i: int) -> np.ndarray:
    """(48, 64) uint8 in {0, 255}."""
    return np.where(photo(i)[..., 0] > photo(i)[..., 0].mean(), 255, 0).astype(np.uint8)


def joints_of(i: int) -> list:
    """One person of 17 joints, [column, row, visibility], as nested lists."""
    rng = np.random.default_rng(i)
    return [[[round(float(x), 2), round(float(y), 2), 2.0] for x, y in rng.uniform(0, (64, 48), (17, 2))]]


def write_good(root: Path, count: int = 64) -> Path:
    """`images/` in every format, with captions in many alphabets beside them, and `depth/`, `canny/` and `joints/`."""
    for name in ("images", "depth", "canny", "joints"):
        (root / name / "sub").mkdir(parents=True, exist_ok=True)
    for i in range(count):
        stem, suffix, picture = good_picture(i)
        (root / "images" / f"{stem}.{suffix}").write_bytes(picture)
        (root / "images" / f"{stem}.txt").write_bytes(b"\xef\xbb\xbf" * (i % 5 == 0) + CAPTIONS[i % len(CAPTIONS)].encode())
        depth, suffix = depth_bytes(i)
        (root / "depth" / f"{stem}.{suffix}").write_bytes(depth)
        (root / "canny" / f"{stem}.png").write_bytes(encoded(edges_of(i), "PNG"))
        (root / "joints" / f"{stem}.json").write_text(json.dumps({"joints": joints_of(i)}))
    return root


def good_picture(i: int) -> tuple[str, str, bytes]:
    """(stem, suffix, bytes) of the i-th picture of the good tree; the stems are in the order of i."""
    forms = list(GOOD_FORMS.items())
    name, make = forms[i % len(forms)]
    stem, suffix = name.split(".")
    folder = "sub/" if i >= 56 else ""
    return f"{folder}{i:03d}_{stem}", suffix, make(i)


def deny(path: Path) -> bool:
    """Take away the permission to read; False where that means nothing, for root."""
    path.chmod(0)
    return not os.access(path, os.R_OK)
