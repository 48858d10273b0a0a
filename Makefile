# Verbs of the project; each does its own set-up. `make help` lists them.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Installed once for each state of these files.
STAMP := $(VENV)/.installed
OUT ?= out/demo
DEMO := models/demo/smelt-demo

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help install check format test test-slow test-gpu goldens demo bench bench-quality bench-peers-quality
.PHONY: peers bench-peers bench-throughput crossings kernels bench-gpu soak size clean

help: ## list the verbs
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(STAMP) ## create .venv and install everything pinned

# torch comes first and exactly, so that the CPU build is taken and no CUDA packages follow.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

check: $(STAMP) ## format, lint, types, import directions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python scripts/types.py
	$(BIN)/python -m pytest -q tests/test_structure.py

format: $(STAMP) ## rewrite the files in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: $(STAMP) ## the whole suite: offline, CPU, under 10 minutes
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 15

test-slow: $(STAMP) ## what takes minutes a test
	$(BIN)/python -m pytest -m slow

test-gpu: $(STAMP) ## what needs a CUDA device
	$(BIN)/python -m pytest -m gpu

goldens: $(STAMP) ## regenerate the golden graphs; the diff is for review
	SMELT_REGENERATE_GOLDENS=1 $(BIN)/python -m pytest -q tests/passes
	git diff --stat tests/goldens

demo: $(STAMP) ## compile the shipped model with AWQ and talk to it
	$(BIN)/python scripts/demo.py $(DEMO) $(OUT)

bench: $(STAMP) ## decode and start-up against transformers, one interleaved run
	$(BIN)/python -m benchmarks.decode

bench-quality: $(STAMP) ## perplexity, KL, demo accuracy of every scheme; needles of every cache
	$(BIN)/python -m benchmarks.quality --docs docs/quantization.md
	$(BIN)/python -m benchmarks.kv_cache --windows 12 --docs docs/quantization.md

# llm-compressor wants another transformers than smelt, so it has an environment of its own.
PEER := build/llm-compressor
PEER_STAMP := $(PEER)/.installed

$(PEER_STAMP): benchmarks/requirements-llm-compressor.txt
	test -x $(PEER)/bin/python || $(PYTHON) -m venv $(PEER)
	$(PEER)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(PEER)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

bench-peers-quality: $(STAMP) $(PEER_STAMP) ## KL beside llm-compressor's AWQ, GPTQ, SmoothQuant
	$(BIN)/python -m benchmarks.llm_compressor --python $(PEER)/bin/python \
	  --work build/llm-compressor-logits --out benchmarks/results/llm_compressor.json \
	  --docs docs/quantization.md

# optimum-intel's own dependencies would bring a torchvision, and with it another torch. llama.cpp is
# built with the instruction sets of a recent Xeon or EPYC, and for g++, which takes ldtilecfg to
# read 8 bytes of its 64 and leaves out the stores of the others.
PEERS := build/peers
PEERS_STAMP := $(PEERS)/.installed
LLAMA := llama_cpp_python-0.3.36
LLAMA_FLAGS := -DGGML_NATIVE=OFF $(foreach set,AVX AVX2 FMA F16C BMI2 AVX512 AVX512_VBMI \
  AVX512_VNNI AVX512_BF16 AMX_TILE AMX_INT8 AMX_BF16,-DGGML_$(set)=ON)

$(PEERS_STAMP): benchmarks/requirements-peers.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  optimum==2.3.0 optimum-intel==2.2.0
	$(PEERS)/bin/python -m pip download --quiet --disable-pip-version-check --no-deps \
	  --no-binary llama-cpp-python --dest $(PEERS)/src llama-cpp-python==0.3.36
	tar -xf $(PEERS)/src/$(LLAMA).tar.gz -C $(PEERS)/src
	sed -i 's/^ *_tile_loadconfig(&tc);/__asm__ volatile("" :: "r"(\&tc) : "memory");\n&/' \
	  $(PEERS)/src/$(LLAMA)/vendor/llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp
	CMAKE_ARGS="$(LLAMA_FLAGS)" $(PEERS)/bin/python -m pip install --quiet \
	  --disable-pip-version-check $(PEERS)/src/$(LLAMA)
	touch $@

peers: $(PEERS_STAMP) ## OpenVINO GenAI and llama.cpp, to measure beside (builds for minutes)

bench-peers: $(STAMP) $(PEERS_STAMP) ## decode, prefill and start-up beside OpenVINO and llama.cpp
	$(BIN)/python -m benchmarks.decode --prompt 512 --gen 64 --out benchmarks/results/peers-cpu.json \
	  --only smelt-bf16,smelt-int8,smelt-int4,openvino-bf16,openvino-int8,openvino-int4,llama-bf16,llama-q8,llama-q4,hf-eager

bench-throughput: $(STAMP) ## many requests at once beside transformers, one interleaved run
	$(BIN)/python -m benchmarks.throughput

crossings: $(STAMP) ## every pair of the runtime's features against plain output
	$(BIN)/python -m benchmarks.crossings --docs docs/crossings.md

kernels: $(STAMP) ## compile every Triton kernel for GPUs that need not be here
	$(BIN)/python -W ignore -m benchmarks.kernels_gpu

bench-gpu: $(STAMP) ## kernels and whole models on a CUDA device, beside torch and transformers
	$(BIN)/python -m benchmarks.gpu

MINUTES ?= 10
soak: $(STAMP) ## random requests, cancellations and failures; nothing may be left
	$(BIN)/python -m benchmarks.soak --minutes $(MINUTES)

size: ## lines of code by folder
	@for d in compiler passes runtime models cli smelt tests; do \
	  printf '%-10s %6d\n' $$d $$(find $$d -name '*.py' -o -name '*.cpp' -o -name '*.h' | xargs cat | wc -l); done

clean: ## remove build results, not the environment
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
