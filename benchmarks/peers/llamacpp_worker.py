"""llama.cpp by its own interface (llama_decode), without llama-cpp-python's sampling in Python."""

from __future__ import annotations

from typing import NamedTuple

import llama_cpp
import numpy as np
from serve import Tokens, arguments, claim_stdout, serve

MAX_TOKENS = 4096  # in the cache, of all sequences
MAX_SEQS = 10


class Row(NamedTuple):
    token: int
    position: int
    sequence: int
    sampled: bool


class Model:
    def __init__(self, file: str, threads: int):
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
        assert self.model, f"llama.cpp cannot load {file}"
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_seq_max, params.kv_unified = MAX_TOKENS, MAX_TOKENS, MAX_SEQS, True
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        assert self.context, f"llama.cpp makes no context for {file}"
        self.num_words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(MAX_TOKENS, 0, 1)

    def generate(self, prompts: Tokens, new_tokens: int) -> Tokens:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)
        lengths = [len(prompt) for prompt in prompts]
        rows = [
            Row(token, position, sequence, position == lengths[sequence] - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        answers = [[token] for token in self.decode(rows)]
        for step in range(new_tokens - 1):
            rows = [Row(answer[-1], lengths[i] + step, i, True) for i, answer in enumerate(answers)]
            for answer, token in zip(answers, self.decode(rows), strict=True):
                answer.append(token)
        return answers

    def decode(self, rows: list[Row]) -> list[int]:
        """The likeliest next token after each row that is sampled."""
        self.batch.n_tokens = len(rows)
        for i, row in enumerate(rows):
            self.batch.token[i], self.batch.pos[i], self.batch.logits[i] = row.token, row.position, row.sampled
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, row.sequence
        code = llama_cpp.llama_decode(self.context, self.batch)
        assert code == 0, f"llama_decode: {code}"
        return [self.likeliest(i) for i, row in enumerate(rows) if row.sampled]

    def likeliest(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.context, row)
        return int(np.ctypeslib.as_array(logits, (self.num_words,)).argmax())


def main() -> None:
    given, answers = arguments(), claim_stdout()
    serve(answers, generate=Model(given["file"], int(given["threads"])).generate)


if __name__ == "__main__":
    main()
