"""vLLM's CPU build; the benchmark preloads what its manual recommends."""

from __future__ import annotations

from PIL import Image
from serve import Tokens, arguments, claim_stdout, serve
from vllm import LLM, SamplingParams

MAX_MODEL_LEN = 4096  # LLaVA-NeXT's largest picture must fit
KV_CACHE_BYTES = 2**30  # 32,768 tokens of bench-1B; unsaid, vLLM takes nine tenths of the machine's memory or refuses


def main() -> None:
    answers = claim_stdout()
    llm = LLM(
        arguments()["checkpoint"], dtype="bfloat16", max_model_len=MAX_MODEL_LEN, max_num_seqs=10,
        kv_cache_memory_bytes=KV_CACHE_BYTES, enable_prefix_caching=False, limit_mm_per_prompt={"image": 1},
        mm_processor_cache_gb=0, disable_log_stats=True,
    )  # fmt: skip

    def run(prompts: list, new_tokens: int) -> Tokens:
        params = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True, detokenize=False)
        return [list(done.outputs[0].token_ids) for done in llm.generate(prompts, params, use_tqdm=False)]

    def generate(prompts: Tokens, new_tokens: int) -> Tokens:
        return run([{"prompt_token_ids": token_ids} for token_ids in prompts], new_tokens)

    def picture(text: str, path: str) -> Tokens:
        return run([{"prompt": text, "multi_modal_data": {"image": Image.open(path).convert("RGB")}}], 1)

    serve(answers, generate=generate, picture=picture)


if __name__ == "__main__":
    main()
