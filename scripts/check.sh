#!/usr/bin/env bash
# Static checks: ruff, pyright, import layers.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_rdx dev
.venv/bin/ruff check .
.venv/bin/pyright
.venv/bin/lint-imports
