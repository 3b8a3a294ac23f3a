"""Reading and resizing label maps, instance maps and photographs; writing files that are whole or absent."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from p2pfast.data.atomic import whole
from p2pfast.errors import InputError, first_line

#: What Pillow's decoders raise on damaged data.
_DAMAGED = (OSError, SyntaxError, ValueError, LookupError, ArithmeticError, TypeError, EOFError, struct.error)
#: Pillow widens 2- and 4-bit grey levels to 8 bits; dividing by these gives the stored numbers back.
_GREY_SCALE = {"L;2": 85, "L;4": 17}
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")
#: Modes whose 8-bit values `Image.convert` translates.
_PICTURES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")


def read_ids(path: Path, kind: str) -> NDArray[np.integer]:
    """A label or instance map (H, W) with the numbers as stored: uint8, or int32 for 16-bit files.

    Palette files give their indices. ``kind`` ("label map", "instance map") is used in messages. Raises
    InputError for unreadable files, pictures in colour and lossy formats.
    """
    with _open(path) as image:
        if image.format in ("JPEG", "WEBP"):
            raise InputError(f"{image.format} changes the numbers of a {kind}; save it as PNG")
        grey_scale = _GREY_SCALE.get(_raw_mode(image), 1)
        _load(image)
        if image.mode in ("L", "P"):
            return np.array(image) // grey_scale if grey_scale > 1 else np.array(image)
        if image.mode == "1":
            return np.array(image).astype(np.uint8)
        if image.mode in _SIXTEEN_BITS:
            return np.array(image).astype(np.int32)
        raise InputError(
            f"a {image.mode} picture, not a {kind}: one channel of ids is needed (8-bit, 16-bit or palette)"
        )


def read_image(path: Path, channels: int) -> NDArray[np.uint8]:
    """A picture (H, W, channels) uint8, converted to RGB (3 channels) or grey (1); 16-bit grey levels become
    8-bit ones. Raises InputError."""
    with _open(path) as image:
        _load(image)
        if image.mode in _SIXTEEN_BITS:
            image = _eight_bits(np.array(image))
        if image.mode not in _PICTURES:
            raise InputError(
                f"a picture in {image.mode}, whose range is not known; save it in colour or grey"
            )
        converted = np.array(image.convert("RGB" if channels == 3 else "L"))
    return converted.reshape(*converted.shape[:2], channels)


def _eight_bits(levels: NDArray[np.integer]) -> Image.Image:
    least, most = int(levels.min()), int(levels.max())
    if least < 0 or most > 65535:
        raise InputError(f"grey levels from {least} to {most}; 0 to 65535 is the range of 16 bits")
    return Image.fromarray(((levels.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))


def _open(path: Path) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(path)
    except UnidentifiedImageError:
        raise InputError("not an image, or damaged at its start") from None
    except Image.DecompressionBombError as error:
        raise InputError(first_line(error)) from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or first_line(error)}") from None
    except _DAMAGED as error:
        raise InputError(f"damaged at its start: {first_line(error)}") from None


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except _DAMAGED as error:
        raise InputError(f"damaged or truncated: {first_line(error)}") from None


def _raw_mode(image: Image.Image) -> str:
    """The pixel layout in the file, known before decoding only."""
    tile = getattr(image, "tile", None)  # set by the decoders of files
    if not tile:
        return image.mode
    arguments = tile[0][3]
    raw = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return raw if isinstance(raw, str) else image.mode


def resize_ids(ids: NDArray[np.integer], height: int, width: int) -> NDArray[np.integer]:
    """Nearest-neighbour resize of (H, W) ids of any integer type, with Pillow's choice of neighbour."""
    if ids.shape == (height, width):
        return ids
    rows = ((np.arange(height) + 0.5) * (ids.shape[0] / height)).astype(np.int64)
    columns = ((np.arange(width) + 0.5) * (ids.shape[1] / width)).astype(np.int64)
    return ids[rows[:, None], columns[None, :]]


def resize_image(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Bicubic resize of (H, W, C) uint8."""
    if pixels.shape[:2] == (height, width):
        return pixels
    squeezed = pixels[:, :, 0] if pixels.shape[2] == 1 else pixels
    resized = np.array(Image.fromarray(squeezed).resize((width, height), Image.Resampling.BICUBIC))
    return resized.reshape(height, width, pixels.shape[2])


def write_image(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Write (H, W), (H, W, 1) or (H, W, 3) uint8 as PNG or JPEG by extension.

    The file appears under its name only when it is complete.
    """
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    image = Image.fromarray(pixels)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as stream:
        if path.suffix.lower() in (".jpg", ".jpeg"):
            image.save(stream, "JPEG", quality=95, subsampling=0)
        else:
            # Level 3 is four times quicker than the default and a few per cent larger.
            image.save(stream, "PNG", compress_level=3)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    with whole(path) as stream:
        stream.write(text.encode())
