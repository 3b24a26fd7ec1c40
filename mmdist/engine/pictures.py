"""Pictures known by what they show: each is encoded once, and rank 0 keeps the encoded ones while there is room."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate

import torch

from mmdist.config import EngineConfig
from mmdist.engine.request import Picture
from mmdist.engine.runner import Runner
from mmdist.models.base import Prompt
from mmdist.spans import Spans

MIB = 2**20


class EmbeddingCache:
    """Encoded pictures by digest, on rank 0's device as the model takes them; the least recently used go first."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.num_bytes = max_bytes, 0
        self.num_hits = self.num_misses = 0
        self.kept: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    def has(self, picture: Picture) -> bool:
        return picture.embeds is not None or picture.digest in self.kept

    def fill(self, picture: Picture) -> bool:
        """Give a picture its rows, if they are known."""
        found = self.kept.get(picture.digest)
        if found is None:
            self.num_misses += 1
            return False
        self.num_hits += 1
        self.kept.move_to_end(picture.digest)
        picture.embeds = found
        return True

    def keep(self, picture: Picture) -> None:
        assert picture.embeds is not None, "a picture is kept once it is encoded"
        if picture.digest in self.kept or picture.embeds.nbytes > self.max_bytes:
            return
        self.kept[picture.digest] = picture.embeds
        self.num_bytes += picture.embeds.nbytes
        while self.num_bytes > self.max_bytes:
            _, oldest = self.kept.popitem(last=False)
            self.num_bytes -= oldest.nbytes


class PictureEncoder:
    """Rank 0's way from Prompt.vision to encoded rows, past what the cache has."""

    def __init__(self, runner: Runner, config: EngineConfig, spans: Spans):
        self.runner, self.model, self.spans = runner, runner.model, spans
        self.cache = EmbeddingCache(config.embedding_cache_mib * MIB)
        self.hashes = config.prefix_cache or config.embedding_cache_mib > 0

    def hash(self, prompt: Prompt) -> None:
        """Fill in Prompt.picture_hashes where a cache asks for them; any thread may do it before list()."""
        if self.hashes and prompt.vision and not prompt.picture_hashes:
            prompt.picture_hashes = [hash_tensors(one) for one in self.model.split_pictures(prompt.vision)]

    def list(self, prompt: Prompt) -> list[Picture]:
        if not prompt.vision:
            return []
        self.hash(prompt)
        num_tokens = len(prompt.image_positions)
        rows = self.model.picture_rows(prompt.vision, num_tokens)
        assert sum(rows) == num_tokens, f"pictures of {rows} rows for {num_tokens} image tokens"
        digests = prompt.picture_hashes or [b""] * len(rows)
        stops = list(accumulate(rows))
        return [Picture(*facts) for facts in zip(range(len(rows)), digests, [0, *stops], stops, strict=False)]

    def encode(self, prompt: Prompt, pictures: Sequence[Picture]) -> bool:
        """Give some of a prompt's pictures their rows; False where all were known."""
        missing = [p for p in pictures if p.embeds is None and not self.cache.fill(p)]
        if not missing:
            return False
        numbers = [picture.number for picture in missing]
        vision = {name: select(tensor, numbers) for name, tensor in prompt.vision.items()}
        with self.spans("vision"):
            encoded = self.runner.encode_images(vision)
        parts = encoded.split(self.model.picture_rows(vision, len(encoded)))
        for picture, rows in zip(missing, parts, strict=True):
            picture.embeds = rows.clone() if self.cache.max_bytes and len(parts) > 1 else rows  # a part holds the whole
            self.cache.keep(picture)
        return True


def select(tensor: torch.Tensor, numbers: list[int]) -> torch.Tensor:
    return tensor if len(numbers) == len(tensor) else tensor[numbers]


def hash_tensors(tensors: dict[str, torch.Tensor]) -> bytes:
    """SHA-256, which CPUs have instructions for: of 7 MB of pixels in 4 ms, where BLAKE2 took 7."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.digest()
