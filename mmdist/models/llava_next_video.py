"""LLaVA-NeXT-Video (7B, 34B): LLaVA-NeXT that also takes a video, a few pooled patches a frame.

Checkpoints: Hugging Face folders. transformers' own video processor needs torchvision, so frames go one by one through
CLIP's image processor, which does the same (short edge, centre crop).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers  # classes are looked up when used: importing them here would triple the start-up time

from mmdist.config import ModelConfig, UserError
from mmdist.models.base import Processor, Prompt
from mmdist.models.hub import check_placeholders
from mmdist.models.llava import LlavaProcessor, positions_of
from mmdist.models.llava_next import LlavaNext
from mmdist.models.vision import MAX_TILES

log = logging.getLogger("mmdist.models")
POOLS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {"average": F.avg_pool2d, "max": F.max_pool2d}
VIDEO_TOKEN = "<video>"


class LlavaNextVideoProcessor(LlavaProcessor):
    takes_video = True

    def __init__(self, processor: Any, folder: Path, config: Any, options: ModelConfig):
        super().__init__(processor, folder, config, options)
        self.video_token_id = config.video_token_index
        side = config.vision_config.image_size // config.vision_config.patch_size
        self.tokens_per_frame = (side // config.spatial_pool_stride) ** 2
        names = ("video_preprocessor_config.json", "preprocessor_config.json")
        settings = json.loads(next(folder / name for name in names if (folder / name).exists()).read_text())
        wanted = ("size", "crop_size", "image_mean", "image_std", "resample")
        self.frames = transformers.CLIPImageProcessorPil(**{name: settings[name] for name in wanted})

    def prompt(
        self,
        *,
        images: Sequence[Any] = (),
        messages: list[dict] | None = None,
        text: str | None = None,
        videos: Sequence[Sequence[Any]] = (),
    ) -> Prompt:
        text = self.text(messages, text)
        if not videos and VIDEO_TOKEN not in text:
            return super().prompt(images=images, text=text)
        if images:
            raise UserError("a request has pictures or videos, not both")
        check_placeholders(text, VIDEO_TOKEN, len(videos), "videos")
        parts = text.split(VIDEO_TOKEN)
        expanded = [VIDEO_TOKEN * (len(frames) * self.tokens_per_frame) for frames in videos]
        text = "".join(piece for pair in zip(parts, [*expanded, ""], strict=True) for piece in pair)
        token_ids = self.inputs(text, [])["input_ids"]
        pixels = [self.frames(images=list(frames), return_tensors="pt")["pixel_values"] for frames in videos]
        return Prompt(token_ids, positions_of(self.video_token_id, token_ids), {"video_frames": torch.cat(pixels)})


class LlavaNextVideo(LlavaNext):
    config_class = transformers.LlavaNextVideoConfig

    @classmethod
    def load_processor(cls, folder: Path, config: Any, options: ModelConfig) -> Processor:
        warn_of_loose_scaling(folder)
        processor = transformers.LlavaNextProcessor.from_pretrained(folder)
        return LlavaNextVideoProcessor(processor, folder, config, options)

    def encode_images(self, vision: dict[str, torch.Tensor]) -> torch.Tensor:
        """Pictures as LLaVA-NeXT, or video_frames (frames, 3, size, size) -> (frames * pooled patches, hidden)."""
        if "video_frames" not in vision:
            return super().encode_images(vision)
        frames = vision["video_frames"].to(self.vision.image_newline).split(MAX_TILES)
        return torch.cat([self.vision.projector(self.pool(self.vision.tower(some))) for some in frames]).flatten(0, 1)

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        """(frames, patches, width) -> (frames, pooled patches, width); before the projector, without newlines."""
        mode, stride = self.config.spatial_pool_mode, self.config.spatial_pool_stride
        if mode not in POOLS:
            raise UserError(f"spatial_pool_mode={mode} in config.json: expected {', '.join(POOLS)}")
        side = self.tile_size // self.config.vision_config.patch_size
        grid = features.transpose(1, 2).unflatten(2, (side, side))
        return POOLS[mode](grid, stride).flatten(2).transpose(1, 2)


def warn_of_loose_scaling(folder: Path) -> None:
    """The hub's conversion wrote the scaling of rope beside its place; transformers does not see it there."""
    text = json.loads((folder / "config.json").read_text())["text_config"]
    if "factor" in text and not text.get("rope_scaling"):
        log.warning(
            '%s: "factor" stands loose in text_config and has no effect (as in transformers); '
            'to scale rope write "rope_scaling": {"type": "linear", "factor": %s}',
            folder / "config.json",
            text["factor"],
        )


MODEL = LlavaNextVideo
