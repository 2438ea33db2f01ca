# Two commands: `make quickstart` and `make test`. Each sets up .venv first and reuses it afterwards.
.DEFAULT_GOAL := help
.PHONY: help setup quickstart tiny test chaos bench lock clean

help: ## show this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: ## make .venv as the lock says (PYTHON=... and LOCK=... override what is chosen)
	@PYTHON='$(PYTHON)' LOCK='$(LOCK)' requirements/install.sh

quickstart: setup ## train SmolLM2-135M from simulated feedback, end to end, and write a report (10 minutes on two cores)
	@.venv/bin/rayward quickstart --resume $(if $(wildcard /dev/nvidia0),,--cluster.learner_ranks 2)

tiny: setup ## the same with a model of 2 M parameters that is pretrained on the spot (5 minutes)
	@.venv/bin/rayward quickstart --tiny --resume

test: setup ## run every check: format, lint, types, import contracts, tests
	@.ci/checks

chaos: setup ## kill, stop and starve a run at random for half an hour, and audit it (CHAOS="--minutes 5 --seed 1")
	@.venv/bin/python -m tests.end_to_end.test_chaos $(CHAOS)

bench: setup ## measure the rows of docs/performance.md, an hour on two cores (ROW=padding: one)
	@.venv/bin/python -m benchmarks.bench $(if $(ROW),--rows $(ROW))

lock: ## make the locks again from pyproject.toml (needs uv)
	@requirements/lock.sh

clean: ## remove .venv and every cache (runs/ stays)
	@rm -rf .venv .venv-trl .venv-install.log .pytest_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
