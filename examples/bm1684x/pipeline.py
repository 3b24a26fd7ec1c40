"""Chat with Llama-3.2-Vision through its static ONNX files, as one would on a BM1684X.

Options and commands are those of the published python_demo/pipeline.py for bmodels; all of them are heeded.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image
from static_model import Sampling, StaticModel

from mmdist.config import ModelConfig, UserError
from mmdist.engine.detokenizer import Detokenizer
from mmdist.engine.load import find_eos
from mmdist.media import load_image
from mmdist.models.family import find_model, load_model_config
from mmdist.tasks.requests import user_message

QUIT, CLEAR = ("q", "quit", "exit"), ("clear", "new")
HELP = f"{', '.join(QUIT)}: leave   {', '.join(CLEAR)}: forget the conversation, and another picture if you like"


class Pipeline:
    def __init__(self, args: argparse.Namespace):
        folder = Path(args.model_path)
        tokenizer = Path(args.tokenizer_path) if args.tokenizer_path is not None else folder
        if not tokenizer.is_dir():
            raise UserError(f"{tokenizer}: no such folder; give one of tokenizer and processor files as -t")
        self.model = StaticModel(folder)
        family = find_model("mllama")
        config = load_model_config(family, folder)
        self.model.eos_token_ids = find_eos(tokenizer, config)
        self.processor = family.load_processor(tokenizer, config, ModelConfig(name="mllama"))
        self.sampling = read_sampling(args)
        self.prompted, self.enable_history = args.prompt_mode == "prompted", args.enable_history
        self.image = None if args.image_path is None else load_image(Path(args.image_path))
        self.clear()

    def clear(self) -> None:
        """The picture stands alone in the first turn, the questions follow in theirs."""
        self.history: list[dict[str, Any]] = []
        if self.image is not None:
            self.history = [{"role": "user", "content": [{"type": "image"}]}]

    def show(self, image: Image.Image) -> None:
        self.image = image
        self.clear()

    def ask(self, question: str) -> str:
        """Print the answer as it comes. UserError when it cannot be asked; the conversation is then as before."""
        images = [] if self.image is None else [self.image]
        messages = [*self.history, user_message(question, 0)]
        if self.prompted:
            prompt = self.processor.prompt(messages=messages, images=images)
        else:
            prompt = self.processor.prompt(text="<|image|>" * len(images) + question, images=images)
        self.model.check(prompt)
        print("\nAnswer: ", end="")
        answer = self.stream(prompt)
        self.remember(messages, answer)
        return answer

    def stream(self, prompt: Any) -> str:
        text, times = Detokenizer(self.processor.decode, []), [time.perf_counter()]
        for token in self.model.generate(prompt, self.sampling):
            times.append(time.perf_counter())
            if token not in self.model.eos_token_ids:
                text.push(token)
                print(text.take(finished=False), end="", flush=True)
        text.finish()
        print(text.take(finished=True))
        print(f"FTL: {times[1] - times[0]:.3f} s")
        if len(times) > 2:
            print(f"TPS: {(len(times) - 2) / (times[-1] - times[1]):.3f} token/s")
        return text.text

    def remember(self, messages: list[dict[str, Any]], answer: str) -> None:
        if not self.enable_history:
            self.clear()
        elif len(self.model.tokens) >= self.model.seq_length:
            print("... (reach the maximal length)")
            self.clear()
        else:
            content = [{"type": "text", "text": answer}]
            self.history = [*messages, {"role": "assistant", "content": content}]

    def chat(self) -> None:
        print(HELP)
        while (line := read_line("\nQuestion: ")) not in (None, *QUIT):
            try:
                if line in CLEAR:
                    path = read_line("\nNew image path (nothing: as before): ")
                    self.show(load_image(Path(path))) if path else self.clear()
                elif line:
                    self.ask(line)
                else:
                    print("Sorry: your question is empty!!")
            except UserError as error:
                print(f"error: {error}")


def read_line(prompt: str) -> str | None:
    """None at the end of the input."""
    try:
        return input(prompt).strip()
    except EOFError:
        return None


def read_sampling(args: argparse.Namespace) -> Sampling:
    sampling = Sampling(
        args.generation_mode, args.temperature, args.top_p, args.repeat_penalty, args.repeat_last_n,
        args.max_new_tokens, args.seed,
    )  # fmt: skip
    limits = {
        "temperature": (sampling.temperature > 0, "above 0; for the likeliest token: --generation_mode greedy"),
        "top_p": (0 < sampling.top_p <= 1, "above 0, at most 1"),
        "repeat_penalty": (sampling.repeat_penalty > 0, "above 0"),
        "repeat_last_n": (sampling.repeat_last_n >= 0, "0 or above"),
        "max_new_tokens": (sampling.max_new_tokens > 0, "above 0"),
    }
    for name, (holds, words) in limits.items():
        if not holds:
            raise UserError(f"--{name} {getattr(sampling, name)}: expected a number {words}")
    if args.devid != "0":
        raise UserError(f"--devid {args.devid}: onnxruntime runs on the CPU here; leave it at 0")
    return sampling


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Chat through the files of weights_tools export mllama --static.")
    parser.add_argument("-m", "--model_path", required=True, help="the exported folder")
    parser.add_argument("-t", "--tokenizer_path", help="folder of tokenizer and processor files; default: that of -m")
    parser.add_argument("-i", "--image_path", help="the picture; without one, text alone")
    parser.add_argument("-d", "--devid", default="0", help="0: onnxruntime has no other device")
    parser.add_argument("--temperature", type=float, default=0.6, help="penalty_sample: divides the logits")
    parser.add_argument(
        "--top_p", type=float, default=0.9, help="penalty_sample: share of the probability to draw from"
    )
    parser.add_argument("--repeat_penalty", type=float, default=1.0, help="penalty_sample: of tokens that were there")
    parser.add_argument("--repeat_last_n", type=int, default=32, help="penalty_sample: among so many of the last ones")
    parser.add_argument("--max_new_tokens", type=int, default=50, help="most tokens of an answer")
    parser.add_argument("--generation_mode", choices=["greedy", "penalty_sample"], default="greedy")
    parser.add_argument("--prompt_mode", choices=["prompted", "unprompted"], default="prompted",
                        help="the chat template around the question, or the question alone")  # fmt: skip
    parser.add_argument("--enable_history", action=argparse.BooleanOptionalAction, default=True,
                        help="later questions see the earlier ones")  # fmt: skip
    parser.add_argument("--seed", type=int, help="penalty_sample: of the random numbers; default: drawn anew")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        Pipeline(args).chat()
    except (UserError, OSError) as error:
        print(f"pipeline.py: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
