# Everything runs in .venv, made from constraints.txt on first use.
PY ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test test-long bench lint clean

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/python -m pytest -q -m "not slow and not gpu"

test-long: lint
	$(BIN)/python -m pytest -q -m "slow or not slow"

bench: $(STAMP)
	$(BIN)/python -m bench.run_all --quick

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files -co --exclude-standard 'csrc/*.h' 'csrc/*.cpp' | xargs $(BIN)/clang-format --dry-run -Werror

clean:
	rm -rf .venv build dist *.egg-info nf_engine/_cache*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis

# An editable install: a change of Python needs nothing, a change of C++ or of the packaging comes through here again.
$(STAMP): pyproject.toml setup.py constraints.txt $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name CMakeLists.txt)
	test -x $(BIN)/python || $(PY) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,demo,images]'
	touch $@
