"""transformers' generate in bfloat16."""

from __future__ import annotations

import torch
from PIL import Image
from serve import Tokens, arguments, claim_stdout, serve
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor


def main() -> None:
    given, answers = arguments(), claim_stdout()
    torch.set_num_threads(int(given["threads"]))
    model = LlavaNextForConditionalGeneration.from_pretrained(given["checkpoint"], dtype=torch.bfloat16)
    processor = LlavaNextProcessor.from_pretrained(given["checkpoint"])

    @torch.inference_mode()
    def run(new_tokens: int, **inputs: torch.Tensor) -> Tokens:
        counts = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
        return model.generate(**inputs, do_sample=False, **counts)[:, inputs["input_ids"].shape[1] :].tolist()

    def generate(prompts: Tokens, new_tokens: int) -> Tokens:
        ids = torch.tensor(prompts)
        return run(new_tokens, input_ids=ids, attention_mask=torch.ones_like(ids))

    def picture(text: str, path: str) -> Tokens:
        return run(1, **processor(text=text, images=Image.open(path).convert("RGB"), return_tensors="pt"))

    serve(answers, generate=generate, picture=picture)


if __name__ == "__main__":
    main()
