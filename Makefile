# Paths are relative, so that a checkout in a folder with spaces in its name works too.
PYTHONS := $(or $(PYTHON),python3 python3.12 python3.11 python3.10)

# A Paddle that was asked for once stays asked for when the environment is made again.
PADDLE_FILE := .venv/paddle.txt
PADDLE_KEPT := $(shell cat $(PADDLE_FILE) 2>/dev/null)
PADDLE ?= $(or $(PADDLE_KEPT),paddlepaddle==3.3.1)
PADDLE_ASKED := $(if $(filter file,$(origin PADDLE)),$(PADDLE_KEPT),$(PADDLE))

RUN := .venv/bin/python
EMU3 := .venv/bin/emu3
# Both names: pip before 25.3 reads the first one for what builds a package, later ones the second.
PIP := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
	PIP_DISABLE_PIP_VERSION_CHECK=1 $(RUN) -m pip install -qq --use-pep517

# The benchmark's peer, Hugging Face transformers, cannot share an environment with PaddleNLP. PEER_PYTHON=... names a
# Python that has it already.
PEER_NEEDS := benchmarks/peer/requirements.txt
PEER_PYTHON ?= .venv-peer/bin/python

# The other peer, llama.cpp, is compiled for this machine; LLAMA_PYTHON=... names a Python that has it already.
LLAMA_NEEDS := benchmarks/peer/llama_requirements.txt
LLAMA_PYTHON ?= .venv-llama/bin/python

# EXTRAS="[ray,video]" installs what is optional as well, and what tests it is run then.
EXTRAS ?=

OUT := demo_output
PICTURE := paddlemix/demo_images/emu3_demo.png
SCENE := paddlemix/demo_images/emu3_scene.png

# Emu3-Mini is trained with PyTorch, in an environment of its own; what MINI_RUN holds is gone on from.
MINI := tools/mini
MINI_PYTHON := .venv-mini/bin/python
MINI_RUN ?= mini_run

# The tutorial of docs/finetune.md; it goes on from what FINETUNE_RUN holds.
FINETUNE := tools/finetune
FINETUNE_RUN ?= finetune_run

FUZZ_SECONDS ?= 600
KILLS ?= 100

.PHONY: help venv ops demo serve eval finetune mini bench lint test fuzz clean asked-again

help:
	@echo "make demo   generate, understand and autoencode with Emu3-Mini, which comes with the package; into $(OUT)/"
	@echo "make serve  a service with Emu3-Mini at http://127.0.0.1:8000, a page included; SERVE=--port=8080 is an option of it,"
	@echo "            SERVE=--help lists them"
	@echo "make eval   measure Emu3-Mini on scenes that its training left out"
	@echo "make finetune  the tutorial of docs/finetune.md: teach Emu3-Mini a shape, a colour and a question by LoRA, and measure it"
	@echo "            before and after; into $(FINETUNE_RUN)/"
	@echo "make mini   train Emu3-Mini from scratch with PyTorch, from data to files: hours on a CPU"
	@echo "make ops    compile the custom operators into .venv (paddlemix/external_ops)"
	@echo "make test   ruff and pytest"
	@echo "make fuzz   new inputs for the properties of tests/test_fuzz.py, for FUZZ_SECONDS=600, then KILLS=100 of drawings"
	@echo "make lint   ruff only"
	@echo "make venv   .venv with all that is needed; the others make it themselves; .venv/bin/emu3 lists the commands"
	@echo "make bench  side by side with transformers, into benchmarks/RESULTS.md; BENCH=--quick takes minutes, not an hour;"
	@echo "            BENCH=prompts is beside llama.cpp; training, operators, released, quality, serving, speculation, costs"
	@echo "            and loading are the others, BENCH=--help lists them"
	@echo "make clean  remove all of that"
	@echo
	@echo "EXTRAS=\"[ray,video]\"  when .venv is made: what is optional (setup.py)"
	@echo "PYTHON=...  the Python to use: 3.10, 3.11 or 3.12"
	@echo "PADDLE=...  the Paddle to install; on a GPU machine, once:"
	@echo '    make venv PADDLE="paddlepaddle-gpu==3.3.1 -i https://www.paddlepaddle.org.cn/packages/stable/cu126/"'

venv: .venv/ready

ifneq ($(PADDLE_ASKED),$(PADDLE_KEPT))
.venv/ready: asked-again
endif

# A `python3.x` can be a shim that only says "command not found", and a Python can lack ensurepip: so each is
# tried. Paddle comes last and by itself, because its GPU index has to replace the usual one for that call.
.venv/ready: requirements.txt requirements-dev.txt constraints.txt setup.py pyproject.toml
	@for python in $(PYTHONS); do \
		found=$$("$$python" -c 'import platform; print(platform.python_version())' 2>/dev/null) || found="does not run"; \
		case $$found in 3.10.*|3.11.*|3.12.*) \
			"$$python" -c 'import ensurepip, venv' 2>/dev/null && break; found="$$found without venv";; \
		esac; \
		all="$$all, $$python ($$found)"; python=; \
	done; \
	if [ -z "$$python" ]; then \
		echo "make venv: Python 3.10, 3.11 or 3.12 is needed, found $${all#, }; name one with PYTHON=..." >&2; exit 1; \
	fi; \
	echo "Making .venv with Python $$found and $(PADDLE): some minutes the first time"; \
	"$$python" -m venv --clear .venv
	@$(PIP) -r requirements.txt -r requirements-dev.txt -e ".$(EXTRAS)"
	@$(PIP) $(PADDLE)
	@$(if $(PADDLE_ASKED),echo '$(PADDLE_ASKED)' > $(PADDLE_FILE))
	@touch $@

OPS := paddlemix/external_ops
OPS_SOURCES := $(wildcard $(OPS)/build.py $(OPS)/setup.py $(OPS)/modules/*.py $(OPS)/*.h $(foreach kind,h cc cu cuh,$(OPS)/*/*.$(kind)))

ops: .venv/ops

.venv/ops: $(OPS_SOURCES) .venv/ready
	@echo "Compiling the operators: about a minute"
	@$(RUN) -W ignore -m paddlemix.external_ops.build
	@touch $@

# Without the commands themselves: it prints what README.md shows.
demo: venv
	@$(EMU3) generate "a large red circle on a white background." --model_path=emu3-mini --seed=1 --dtype=float32 \
		--guidance_scale=1.5 --temperature=0.5 --output_dir=$(OUT)
	@$(EMU3) understand "What colour is the triangle?" "Please describe the image" "背景是什么颜色？" \
		--model_path=emu3-mini --dtype=float32 --image_path=$(SCENE)
	@$(EMU3) autoencode --model_path=emu3-mini --image_path=$(PICTURE) --output_dir=$(OUT)

serve: venv
	@$(EMU3) serve --model_path=emu3-mini $(SERVE)

eval: venv
	$(RUN) $(MINI)/evaluate.py

finetune: venv
	$(RUN) $(FINETUNE)/make_data.py --out "$(FINETUNE_RUN)/data"
	$(EMU3) prepare --vq_model_path=emu3-mini --data_path "$(FINETUNE_RUN)/data/train.jsonl" \
		--output_path "$(FINETUNE_RUN)/codes" --batch_size=16
	$(RUN) $(FINETUNE)/settle.py --data "$(FINETUNE_RUN)/data/train.jsonl" --codes "$(FINETUNE_RUN)/codes" \
		--out "$(FINETUNE_RUN)/settled"
	$(EMU3) train --model_path=emu3-mini --data_path "$(FINETUNE_RUN)/settled" --output_dir "$(FINETUNE_RUN)/lora" \
		--lora --lora_rank=16 --lora_alpha=32 \
		--lora_target_modules q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head \
		--learning_rate=3e-3 --min_learning_rate=1.5e-4 --warmup_steps=10 --weight_decay=0 --max_steps=800 \
		--per_device_train_batch_size=8 --gradient_accumulation_steps=1 --save_steps=200
	$(RUN) $(FINETUNE)/before_after.py --lora_path "$(FINETUNE_RUN)/lora" --picture "$(FINETUNE_RUN)/before_after.png"

.venv-mini/ready: $(MINI)/requirements.txt
	@for python in $(PYTHONS); do "$$python" -m venv --clear .venv-mini && break; done
	@$(MINI_PYTHON) -m pip install -qq -r $(MINI)/requirements.txt
	@touch $@

mini: .venv-mini/ready
	$(MINI_PYTHON) $(MINI)/train_vision.py --out "$(MINI_RUN)"
	$(MINI_PYTHON) $(MINI)/train_language.py --out "$(MINI_RUN)"
	$(MINI_PYTHON) $(MINI)/export.py --out "$(MINI_RUN)"

lint: venv
	$(RUN) -m ruff check .

test: lint ops
	$(RUN) -m pytest -n 2 --dist loadfile -m "not long"

fuzz: ops
	$(RUN) -m pytest -m long
	$(RUN) tools/fuzz.py --seconds $(FUZZ_SECONDS)
	$(RUN) tools/kill_drawings.py --kills $(KILLS)

.venv-peer/ready: $(PEER_NEEDS) | .venv/ready
	@echo "Making .venv-peer with transformers and PyTorch: some minutes the first time"
	@$(RUN) -m venv --clear .venv-peer
	@PIP_DISABLE_PIP_VERSION_CHECK=1 .venv-peer/bin/python -m pip install -qq -r $(PEER_NEEDS)
	@touch $@

.venv-llama/ready: $(LLAMA_NEEDS) | .venv/ready
	@echo "Making .venv-llama and compiling llama.cpp: ten minutes the first time"
	@$(RUN) -m venv --clear .venv-llama
	@CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_OPENMP=ON -DLLAVA_BUILD=OFF" PIP_DISABLE_PIP_VERSION_CHECK=1 \
		.venv-llama/bin/python -m pip install -qq -r $(LLAMA_NEEDS)
	@touch $@

# `prompts` alone is beside llama.cpp.
BENCH_PEER := $(if $(filter prompts,$(BENCH)),$(LLAMA_PYTHON),$(PEER_PYTHON))

bench: venv $(patsubst %/bin/python,%/ready,$(filter .venv-peer/% .venv-llama/%,$(BENCH_PEER)))
	PEER_PYTHON="$(PEER_PYTHON)" LLAMA_PYTHON="$(LLAMA_PYTHON)" $(RUN) benchmarks/bench.py $(BENCH)

clean:
	rm -rf .venv .venv-mini .venv-peer .venv-llama benchmarks/run $(OUT) finetune_run build $(OPS)/build $(OPS)/modules/*.egg-info dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
