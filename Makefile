# Each target is one command; `make` lists them.
PYTHON ?= python
JOBS = llama smollm resnet mlp

.PHONY: help test test-all check coverage ci lowest package zoo docs support benchmarks mutate

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' $(MAKEFILE_LIST)

test: ## the fast tests
	$(PYTHON) -m pytest

test-all: ## the fast tests and the slow ones
	$(PYTHON) -m pytest -m "not accelerator"

check: ## linter, formatter, types
	ruff check .
	ruff format --check .
	mypy

coverage: ## which lines of the package all tests reach
	$(PYTHON) -m pytest -m "not accelerator" --cov --cov-report=term-missing:skip-covered

ci: ## all that CI runs, in a new virtual environment
	.ci/run

lowest: ## the tests on the lowest versions, in a new virtual environment
	.ci/lowest

package: ## build the wheel and the sdist into dist/, and check them
	.ci/package dist

zoo: ## the callback on many kinds of modules
	$(PYTHON) benchmarks/zoo.py

docs: ## the site into site/
	mkdocs build --strict

support: ## the support matrix, made of real runs
	$(PYTHON) tests/support.py

benchmarks: ## the figures of docs/benchmarks, in about an hour
	for job in $(JOBS); do \
		$(PYTHON) benchmarks/step_time.py --job $$job --json docs/benchmarks/step_time_$$job.json || exit; done
	$(PYTHON) benchmarks/growth.py --json docs/benchmarks/growth.json
	$(PYTHON) benchmarks/memory.py --json docs/benchmarks/memory.json
	$(PYTHON) benchmarks/memory_report.py --json docs/benchmarks/memory_report.json
	$(PYTHON) benchmarks/plot.py docs/benchmarks

mutate: ## how many of 50 small faults in the package the fast tests notice, in some hours
	$(PYTHON) tests/mutate.py --mutants 50
