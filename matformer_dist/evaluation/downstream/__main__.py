"""lm-eval's own command, which then knows the model `matformer`:

python -m matformer_dist.evaluation.downstream --model matformer \\
    --model_args pretrained=RUN,submodel=S:2+M:2 --tasks hellaswag
"""

from __future__ import annotations

import sys

from lm_eval.__main__ import cli_evaluate

import matformer_dist.evaluation.downstream.adapter  # noqa: F401 registers itself
from matformer_dist.errors import EXIT_USER_ERROR, UserError

if __name__ == "__main__":
    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
