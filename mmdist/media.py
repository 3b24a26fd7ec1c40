"""Pictures and videos from files and from bytes; what cannot be read is named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mmdist.config import UserError

HAS_AV = find_spec("av") is not None  # the extra `video`; loaded when used, as few jobs need it
PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}

# What strangers may send. Containers by their first bytes, so that FFmpeg never takes a text for a playlist: those
# name further files and addresses, which it would open.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
CONTAINERS = {
    "mp4": (4, b"ftyp"),
    "matroska": (0, b"\x1aE\xdf\xa3"),
    "avi": (8, b"AVI "),
    "asf": (0, b"0&\xb2u\x8ef\xcf"),
}
MAX_SCANS = 100  # of a JPEG; they have at most a dozen, and each costs a pass over all pixels however few its bytes


class TooLarge(UserError):
    """A picture or video beyond a limit."""


@dataclass(frozen=True)
class Limits:
    """For files of strangers. max_pixels: of a picture, or of a frame. max_frames: of a video, all of them."""

    max_pixels: int
    max_frames: int


def user_message(text: str, num_images: int, num_videos: int = 0) -> dict[str, Any]:
    """A question about pictures and videos, which stand before it."""
    media = [{"type": "image"}] * num_images + [{"type": "video"}] * num_videos
    return {"role": "user", "content": [*media, {"type": "text", "text": text}]}


def find_file(path: str, folder: Path) -> Path:
    """A relative path is looked up from the working directory, then from `folder`."""
    return Path(path) if Path(path).exists() else folder / path


def load_image(path: Path) -> Image.Image:
    """An RGB picture, turned as its EXIF says (as transformers.image_utils.load_image does)."""
    try:
        return read_image(path.read_bytes(), str(path))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such picture") from error
    except OSError as error:
        raise UserError(f"{path}: damaged picture ({error})") from error


def read_image(data: bytes, name: str, limits: Limits | None = None) -> Image.Image:
    """load_image of a file's bytes; name: for errors. With limits: one picture in one of FORMATS; TooLarge."""
    try:
        with Image.open(BytesIO(data), formats=FORMATS if limits else None) as image:
            if limits is not None:
                check_header(image, data, name, limits)
            return ImageOps.exif_transpose(image).convert("RGB")
    except (UserError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        known = f" ({', '.join(FORMATS)})" if limits else ""
        raise UserError(f"{name}: not a picture{known}") from error
    except Image.DecompressionBombError as error:
        raise TooLarge(f"{name}: too large ({error}); scale it down first") from error
    except Exception as error:  # decoders of damaged files raise whatever comes
        raise UserError(f"{name}: damaged picture ({error})") from error


def check_header(image: Image.Image, data: bytes, name: str, limits: Limits) -> None:
    """Before a pixel is decoded. MPO is what phones write: a JPEG with further pictures behind it."""
    check_pixels(image.width, image.height, name, limits)
    num_frames = getattr(image, "n_frames", 1)
    if num_frames > 1 and image.format != "MPO":
        raise UserError(f"{name}: an animation of {num_frames} pictures; send one of them")
    if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > MAX_SCANS:
        raise UserError(f"{name}: damaged picture (a JPEG of more than {MAX_SCANS} scans)")


def check_pixels(width: int, height: int, name: str, limits: Limits) -> None:
    if width * height > limits.max_pixels:
        raise TooLarge(f"{name}: {width} x {height} pixels are more than {limits.max_pixels}; scale it down first")


def load_video(path: Path, num_frames: int) -> list[Image.Image]:
    """num_frames RGB frames, evenly spread (all of a shorter video); .npy: uint8 (frames, height, width, 3)."""
    if not path.is_file():
        raise UserError(f"{path}: no such video")
    frames = read_array(path, str(path), num_frames) if path.suffix == ".npy" else decode(path, str(path), num_frames)
    if not frames:
        raise UserError(f"{path}: a video of 0 frames")
    return frames


def read_video(data: bytes, name: str, num_frames: int, limits: Limits) -> list[Image.Image]:
    """load_video of a stranger's bytes: one of CONTAINERS or .npy; TooLarge."""
    is_array = data.startswith(b"\x93NUMPY")
    frames = (read_array if is_array else decode)(data, name, num_frames, limits)
    if not frames:
        raise UserError(f"{name}: a video of 0 frames")
    return frames


def choose_frames(total: int, num_frames: int) -> list[int]:
    """0, total / n, 2 total / n, ... rounded down, as LLaVA-NeXT-Video's own examples have it."""
    if total <= num_frames:
        return list(range(total))
    return [index * total // num_frames for index in range(num_frames)]


def check_length(total: int, name: str, limits: Limits) -> None:
    if total > limits.max_frames:
        raise TooLarge(f"{name}: more than {limits.max_frames} frames; send a shorter video")


def read_array(source: Path | bytes, name: str, num_frames: int, limits: Limits | None = None) -> list[Image.Image]:
    try:
        array: Any = array_of(source) if isinstance(source, bytes) else np.load(source, "r", allow_pickle=False)
    except Exception as error:  # numpy parses the header as Python, whose errors are many
        raise UserError(f"{name}: not an array of frames ({error})") from error
    if not isinstance(array, np.ndarray) or array.ndim != 4 or array.shape[3] != 3 or array.dtype != np.uint8:
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "no array"
        raise UserError(f"{name}: expected uint8 (frames, height, width, 3), found {found}")
    if limits is not None:
        check_pixels(array.shape[2], array.shape[1], name, limits)
        check_length(len(array), name, limits)
    return [Image.fromarray(np.ascontiguousarray(array[index])) for index in choose_frames(len(array), num_frames)]


def array_of(data: bytes) -> np.ndarray:
    """np.load of a file's bytes; one whose header promises more numbers than follow is not allocated: ValueError."""
    file = BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape)


def decode(source: Path | bytes, name: str, num_frames: int, limits: Limits | None = None) -> list[Image.Image]:
    """Two passes over the file: headers may not say how many frames there are, or say it wrong."""
    if not HAS_AV:
        raise UserError(f"{name}: reading videos takes PyAV: pip install 'mmdist[video]', or give frames as .npy")
    av = import_module("av")
    try:
        total = 0
        for total, _ in enumerate(film_frames(av, source, name, limits), 1):
            if limits is not None:
                check_length(total, name, limits)
        wanted = set(choose_frames(total, num_frames))
        frames = enumerate(film_frames(av, source, name, limits))
        return [frame.to_image() for index, frame in frames if index in wanted]
    except UserError:
        raise
    except Exception as error:  # of damaged files, PyAV's own errors and Python's of what it finds in them
        raise UserError(f"{name}: not a readable video ({error})") from error


def film_frames(av: Any, source: Path | bytes, name: str, limits: Limits | None) -> Iterator[Any]:
    film, container = (BytesIO(source), container_of(source, name)) if isinstance(source, bytes) else (source, None)
    with av.open(film, format=container, metadata_errors="replace") as opened:
        stream = opened.streams.video[0]
        if limits is not None:
            check_pixels(stream.width, stream.height, name, limits)
            # For frames larger than the header says; decoders count their own buffers, hence more than a frame has.
            stream.codec_context.options = {"max_pixels": str(2 * limits.max_pixels + 10**6)}
        yield from opened.decode(stream)


def container_of(data: bytes, name: str) -> str:
    for container, (start, magic) in CONTAINERS.items():
        if data[start : start + len(magic)] == magic:
            return container
    raise UserError(f"{name}: not a video ({', '.join(CONTAINERS)}, or frames as .npy)")
