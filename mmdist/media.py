"""Pictures and videos from files; what cannot be read is named."""

from __future__ import annotations

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


def read_image(data: bytes, name: str) -> Image.Image:
    """load_image of a file's bytes; name: for errors."""
    try:
        with Image.open(BytesIO(data)) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError as error:
        raise UserError(f"{name}: not a picture") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{name}: too large ({error}); scale it down first") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{name}: damaged picture ({error})") from error


def load_video(path: Path, num_frames: int) -> list[Image.Image]:
    """num_frames RGB frames, evenly spread (all of a shorter video); .npy: uint8 (frames, height, width, 3)."""
    if not path.is_file():
        raise UserError(f"{path}: no such video")
    frames = read_array(path, num_frames) if path.suffix == ".npy" else decode(path, num_frames)
    if not frames:
        raise UserError(f"{path}: a video of 0 frames")
    return frames


def choose_frames(total: int, num_frames: int) -> list[int]:
    """0, total / n, 2 total / n, ... rounded down, as LLaVA-NeXT-Video's own examples have it."""
    if total <= num_frames:
        return list(range(total))
    return [index * total // num_frames for index in range(num_frames)]


def read_array(path: Path, num_frames: int) -> list[Image.Image]:
    try:
        array: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: not an array of frames ({error})") from error
    if not isinstance(array, np.ndarray) or array.ndim != 4 or array.shape[3] != 3 or array.dtype != np.uint8:
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "no array"
        raise UserError(f"{path}: expected uint8 (frames, height, width, 3), found {found}")
    return [Image.fromarray(np.ascontiguousarray(array[index])) for index in choose_frames(len(array), num_frames)]


def decode(path: Path, num_frames: int) -> list[Image.Image]:
    """Two passes over the file: headers may not say how many frames there are, or say it wrong."""
    if not HAS_AV:
        raise UserError(f"{path}: reading videos takes PyAV: pip install 'mmdist[video]', or give frames as .npy")
    av = import_module("av")
    try:
        with av.open(str(path)) as container:
            total = sum(1 for _ in container.decode(video=0))
        wanted = set(choose_frames(total, num_frames))
        with av.open(str(path)) as container:
            frames = enumerate(container.decode(video=0))
            return [frame.to_image() for index, frame in frames if index in wanted]
    except (av.FFmpegError, IndexError, OSError) as error:
        raise UserError(f"{path}: not a readable video ({error})") from error
