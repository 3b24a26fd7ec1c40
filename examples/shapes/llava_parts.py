"""What the LLaVA families share in training: the tower, the decoder over packed rows, and a warm start."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from checkpoint import LLAVA_PREFIXES
from packing import Rows, segment_mask


def encode_tiles(model: nn.Module, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(tiles, 3, side, side) -> projected features and first-layer features, both (tiles, P, hidden)."""
    features, first = run_tower(model, tiles)
    return model.model.multi_modal_projector(features), first


def run_tower(model: nn.Module, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the projector gets and first-layer features, both (tiles, P, hidden), without the class token."""
    tower = model.model.vision_tower
    x = tower.pre_layrnorm(tower.embeddings(tiles))
    first = None
    for layer in tower.encoder.layers[:-1]:  # vision_feature_layer is -2: the last layer is never used
        x = layer(x, None)
        first = x if first is None else first
    return x[:, 1:], first[:, 1:]


def decode_rows(model: nn.Module, embeds: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Logits (answers' tokens, vocabulary) of rows with input embeddings (B, L, hidden)."""
    hidden = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=segment_mask(rows.segments),
        position_ids=rows.positions,
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden[rows.asked])


def read_base(folder: Path) -> dict[str, torch.Tensor]:
    """float32 weights of a shipped LLaVA checkpoint, by the names of transformers' modules."""
    weights = load_file(folder / "model.safetensors")
    return {_module_name(name): value.float() for name, value in weights.items()}


def _module_name(hub_name: str) -> str:
    hub, ours = next((hub, ours) for hub, ours in LLAVA_PREFIXES.items() if hub_name.startswith(hub))
    return ours + hub_name.removeprefix(hub)


def resize_positions(table: torch.Tensor, num_patches: int) -> torch.Tensor:
    """CLIP's position table (1 + old patches, hidden) -> (1 + num_patches, hidden), bicubic over the square."""
    old, new = (round(count**0.5) for count in (len(table) - 1, num_patches))
    grid = table[1:].T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], grid.reshape(-1, new * new).T])
