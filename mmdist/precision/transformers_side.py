"""transformers' own model and generate() behind Engine's door: task=generate writes its answers as it does ours.

For the families whose checkpoints are the hub's. Prompts come from the family's processor, which is transformers' own;
one request at a time, so that nothing is padded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers  # classes are looked up when used: importing them here would triple the start-up time
from torch import nn
from transformers.models.mllama import processing_mllama

from mmdist.backend import find_device
from mmdist.config import Config, SamplingParams, UserError
from mmdist.engine.cache import cache_shape
from mmdist.engine.detokenizer import build_detokenizer
from mmdist.engine.load import find_checkpoint, find_eos, open_model
from mmdist.engine.record import Recorder, list_stages, spread
from mmdist.engine.request import Output, Request, failed
from mmdist.engine.sampler import logprobs_entry
from mmdist.manifest import MANIFEST
from mmdist.models.base import MultimodalModel, Prompt
from mmdist.quant_files import find_format
from mmdist.tp import TP

Inputs = dict[str, torch.Tensor]


def pictures(prompt: Prompt, config: Any) -> Inputs:
    return prompt.vision


def frames(prompt: Prompt, config: Any) -> Inputs:
    """A video, or pictures."""
    vision = dict(prompt.vision)
    return {"pixel_values_videos": vision["video_frames"][None]} if "video_frames" in vision else vision


def tiles(prompt: Prompt, config: Any) -> Inputs:
    """Llama-3.2-Vision's, and which tokens look at them."""
    if not prompt.vision:
        return {}
    length = len(prompt.token_ids)
    ranges = processing_mllama.get_cross_attention_token_mask(prompt.token_ids, config.image_token_index)
    mask = processing_mllama.convert_sparse_cross_attention_mask_to_dense(
        [ranges],
        num_tiles=[prompt.vision["aspect_ratio_mask"].sum(-1).tolist()],
        max_num_tiles=config.vision_config.max_num_tiles,
        length=length,
    )
    batched = {name: tensor[None] for name, tensor in prompt.vision.items()}
    return {**batched, "cross_attention_mask": torch.tensor(mask)}


# Of each family that transformers has too, what its model takes beside the tokens.
FAMILIES: dict[str, Callable[[Prompt, Any], Inputs]] = {
    "llava": pictures,
    "llava_next": pictures,
    "llava_next_video": frames,
    "mllama": tiles,
}


def check_family(config: Config) -> None:
    """Refuse what transformers cannot load, before anything is."""
    if config.model.name not in FAMILIES:
        raise UserError(
            f"reference=transformers: transformers has no model={config.model.name} (but {', '.join(FAMILIES)}); "
            "use reference=world_size_1, a file of answers, or another checkpoint"
        )
    folder = find_checkpoint(config)
    for reason, found in (("cut for ranks", (folder / MANIFEST).exists()), ("quantised", bool(find_format(folder)))):
        if found:
            raise UserError(
                f"reference=transformers: {folder} is {reason}; give the plain checkpoint, or use "
                "reference=world_size_1 or a file of answers"
            )


DEFAULTS = SamplingParams()
LACKING = ("frequency_penalty", "presence_penalty", "logit_bias", "min_new_tokens", "stop_token_ids", "json_schema",
           "regex")  # fmt: skip


class TransformersEngine:
    def __init__(self, config: Config):
        """config: of a job on one rank."""
        check_family(config)
        device = find_device(config.hardware)
        ours, _, checkpoint, model_config = open_model(config, TP(), device)
        assert isinstance(ours, MultimodalModel), "these families generate"
        self.family, self.config, self.recorder = type(ours), model_config, None
        self.max_model_len = cache_shape(ours, config.engine).max_model_len
        self.prompts = self.family.load_processor(checkpoint.folder, model_config, config.model)
        self.inputs = FAMILIES[config.model.name]
        self.eos = find_eos(checkpoint.folder, model_config)
        self.watched = set(list_stages(ours))
        self.model = load_model(checkpoint.folder, model_config, ours.dtype).to(device)

    recorder: Recorder | None

    def stages(self) -> dict[str, nn.Module]:
        """The modules that are ours too, by our names."""
        named = ((rename(name, self.family.renames), module) for name, module in self.model.named_modules())
        return {name: module for name, module in named if name in self.watched}

    def generate(self, requests: Iterable[Request]) -> Iterator[Output]:
        """The last output of each request."""
        for request in requests:
            problem = self.find_problem(request)
            yield failed(request.id, request.prompt.token_ids, problem) if problem else self.answer(request)

    def find_problem(self, request: Request) -> str:
        """Why transformers cannot answer as our engine would; empty where it can."""
        length, params = len(request.prompt.token_ids), request.params
        if length >= self.max_model_len:
            return f"the prompt has {length} tokens, engine.max_model_len={self.max_model_len} must be larger"
        lacks = [name for name in LACKING if getattr(params, name) != getattr(DEFAULTS, name)]
        return f"{lacks[0]}={getattr(params, lacks[0])}: not with reference=transformers; leave it out" if lacks else ""

    @torch.inference_mode()
    def answer(self, request: Request) -> Output:
        prompt, params = request.prompt, request.params
        eos = [] if params.ignore_eos else sorted(self.eos)
        ids = torch.tensor([prompt.token_ids])
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.inputs(prompt, self.config)}
        self.model.generation_config = transformers.GenerationConfig(
            max_new_tokens=min(params.max_new_tokens, self.max_model_len - len(prompt.token_ids)),
            do_sample=False,
            repetition_penalty=params.repetition_penalty,
            eos_token_id=eos or None,
            pad_token_id=0,
        )
        found = self.model.generate(
            **{name: tensor.to(self.model.device) for name, tensor in given.items()},
            output_logits=True,
            return_dict_in_generate=True,
        )
        return self.finish(request, eos, found.sequences[0, ids.shape[1] :].tolist(), found.logits)

    def finish(self, request: Request, eos: list[int], token_ids: list[int], logits: list[torch.Tensor]) -> Output:
        """Cut at the first stop text, as our engine does."""
        detokenizer = build_detokenizer(self.prompts, request.params)
        ended = token_ids[-1] in eos
        said = token_ids[:-1] if ended and not request.params.include_stop_str_in_output else token_ids
        stopped = next((i for i, token_id in enumerate(said, 1) if detokenizer.push(token_id)), None)
        token_ids = token_ids[:stopped]
        stopped = stopped or detokenizer.finish() or ended
        rows = [row[0].float().cpu() for row in logits[: len(token_ids)]]
        if self.recorder is not None:
            self.record(self.recorder, request.id, rows)
        count = request.params.logprobs
        return Output(
            id=request.id,
            delta=detokenizer.text,
            text=detokenizer.text,
            prompt_token_ids=request.prompt.token_ids,
            token_ids=token_ids,
            logprobs=None
            if count is None
            else [logprobs_entry(row, token_id, count) for row, token_id in zip(rows, token_ids, strict=True)],
            finish_reason="stop" if stopped else "length",
        )

    def record(self, recorder: Recorder, request_id: str, logits: list[torch.Tensor]) -> None:
        """The first pass of a layer is over the prompt, and over its pictures."""
        seen, recorder.seen = recorder.seen, {}
        for row in logits:
            recorder.take_logits(request_id, row)
        recorder.take(request_id, {name: rows_of(name, outputs) for name, outputs in seen.items()})


def rows_of(stage: str, outputs: list[torch.Tensor]) -> torch.Tensor:
    """Of a decoder the prompt's last token, of an encoder some of all rows."""
    return outputs[0][0, -1:] if stage.startswith("decoder.") else spread(outputs[0].flatten(0, -2))


def rename(name: str, renames: Any) -> str:
    """A module's name in transformers -> ours."""
    for theirs, own in renames.items():
        if f"{name}.".startswith(theirs):
            return (own + f"{name}.".removeprefix(theirs)).rstrip(".")
    return name


def load_model(folder: Path, config: Any, dtype: torch.dtype) -> Any:
    if config.model_type == "mllama":
        config.vision_config.intermediate_layers_indices = before(config.vision_config.intermediate_layers_indices)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, config=config, dtype=dtype)
    return model.eval()


def before(layers: list[int]) -> list[int]:
    """transformers 5.23 takes the outputs of these layers where Meta's code takes their inputs (see
    mmdist.models.mllama_vision), which are the outputs of the layers before."""
    if 0 in layers:
        raise UserError("reference=transformers: intermediate_layers_indices has 0, which transformers cannot express")
    return [layer - 1 for layer in layers]
