PYTHON ?= .venv/bin/python
build:
	$(PYTHON) setup.py build_ext --inplace
.PHONY: build
