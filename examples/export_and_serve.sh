#!/usr/bin/env bash
# From a checkpoint to a server that speaks OpenAI's protocol: examples/export_and_serve.sh runs/milora/last.ckpt
set -euo pipefail
python main.py export --ckpt_path "$1" --output exported --format merged
transformers serve exported --port 8000      # or: vllm serve exported; see docs/serving.md
