# Everything runs in .venv, made from constraints.txt on first use.
PY ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

.PHONY: demo test test-long test-kernels test-cpp test-tsan test-asan fuzz mutants mutants-python bench lint clean

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: lint test-cpp
	$(PYTEST) -m "not slow and not gpu"
	$(MAKE) test-kernels

# The long sweeps are in few files: test by test over the workers, not file by file.
test-long: lint test-tsan test-asan mutants fuzz
	$(PYTEST:loadfile=worksteal) -m "slow or not slow"
	$(MAKE) test-kernels

# The Triton kernels without a GPU, each part in a process of its own: Triton interprets or compiles, never both.
test-kernels: $(STAMP)
	$(BIN)/python -m pytest -q tests/interp
	$(BIN)/python -m pytest -q -s tests/compile

# The C++ engine without Python and without a GPU: its tests bring a stand-in for the CUDA driver. No disk is needed.
SEEDS ?= 1000
FORMAT_RUNS ?= 1000000
MANIFEST_RUNS ?= 100000
CPP_BUILD ?= build/cpp
CPP_FOLDER ?= $(firstword $(wildcard /dev/shm) /tmp)
WITH_TOOLS := PATH="$(abspath $(BIN)):$$PATH"

define build-cpp
	$(WITH_TOOLS) cmake -S csrc -B $(CPP_BUILD)/$(1) -G Ninja -DNF_TESTS=ON $(2) >/dev/null
	$(WITH_TOOLS) ninja -C $(CPP_BUILD)/$(1) --quiet
endef

test-cpp: $(STAMP)
	$(call build-cpp,plain)
	$(CPP_BUILD)/plain/format_test
	$(CPP_BUILD)/plain/fake_cuda_test
	$(CPP_BUILD)/plain/alloc_test --folder $(CPP_FOLDER)
	$(CPP_BUILD)/plain/engine_test --folder $(CPP_FOLDER) --seeds 60

# Every report ends the program with a status that is not 0.
test-tsan: $(STAMP)
	$(call build-cpp,thread,-DNF_SANITIZE=thread)
	$(CPP_BUILD)/thread/fake_cuda_test
	for part in device cpu capture life; do \
	    $(CPP_BUILD)/thread/engine_test --folder $(CPP_FOLDER) --seeds $(SEEDS) --part $$part || exit 1; done
	@echo "0 reports of ThreadSanitizer"

test-asan: $(STAMP)
	$(call build-cpp,address,-DNF_SANITIZE=address)
	$(CPP_BUILD)/address/format_test
	$(CPP_BUILD)/address/fake_cuda_test
	$(CPP_BUILD)/address/alloc_test --folder $(CPP_FOLDER)
	$(CPP_BUILD)/address/engine_test --folder $(CPP_FOLDER) --seeds $(SEEDS)
	@echo "0 reports of AddressSanitizer, LeakSanitizer and UndefinedBehaviorSanitizer"

fuzz: $(STAMP)
	$(call build-cpp,fuzzer,-DNF_SANITIZE=fuzzer -DCMAKE_CXX_COMPILER=clang++)
	cd $(CPP_BUILD)/fuzzer && ./fuzz_format -max_len=20480 -runs=$(FORMAT_RUNS) -print_final_stats=1 -verbosity=0
	@echo "$(FORMAT_RUNS) runs of the parser of cache files, 0 crashes"
	$(BIN)/python tests/fuzz_manifest.py $(MANIFEST_RUNS)

mutants: $(STAMP)
	$(WITH_TOOLS) $(BIN)/python csrc/tests/mutants.py

mutants-python: $(STAMP)
	$(BIN)/python tests/mutants.py

bench: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	$(BIN)/python -m bench.run_all --quick

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files -co --exclude-standard 'csrc/*.h' 'csrc/*.cpp' | xargs $(BIN)/clang-format --dry-run -Werror

clean:
	rm -rf .venv build dist *.egg-info nf_engine/_cache*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis

# An editable install: a change of Python needs nothing, a change of C++ or of the packaging comes through here again.
$(STAMP): pyproject.toml setup.py constraints.txt $(shell find csrc -path csrc/tests -prune -o -name '*.cpp' -print -o -name '*.h' -print -o -name CMakeLists.txt -print)
	test -x $(BIN)/python || $(PY) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,demo,images,triton]'
	touch $@
