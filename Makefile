# make book: the site from chapters executed here.  make test: everything that is checked.  make help: the rest.
.NOTPARALLEL:
# Where it is set, every process compiles PyTorch and Transformers anew: 8 seconds each.
unexport PYTHONDONTWRITEBYTECODE
.PHONY: help book test harden environment execute site lint clean

help:
	@echo "make book         run every chapter on this machine, build the site from them (some minutes the first time)"
	@echo "make test         lint, unit tests, chapters on tiny parameters, site build, pages in a browser"
	@echo "make harden       the whole of the tests of which make test keeps a tenth: damaged files, kills, kernel cases"
	@echo "make environment  only make .venv from requirements.lock"
	@echo "make execute      run the chapters in place: refreshes the outputs that are committed"
	@echo "make site         build the site from the committed outputs (seconds)"
	@echo "make lint         ruff"
	@echo "make clean        remove builds, keep .venv"

book:
	@bash scripts/book.sh

test:
	@bash scripts/test.sh

harden:
	@bash scripts/harden.sh

environment:
	@bash scripts/environment.sh

execute: environment
	@.venv/bin/cats reproduce --in-place && .venv/bin/python scripts/picture.py

site: environment
	@bash scripts/site.sh
	@echo "Site: $$PWD/_build/html/index.html"

lint: environment
	@.venv/bin/ruff check .

clean:
	@rm -rf _build build
