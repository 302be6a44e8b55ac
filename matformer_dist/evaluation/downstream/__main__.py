"""lm-eval's own command, which then knows the model `matformer`:

python -m matformer_dist.evaluation.downstream --model matformer \\
    --model_args pretrained=RUN,submodel=S:2+M:2 --tasks hellaswag
"""

from __future__ import annotations

from lm_eval.__main__ import cli_evaluate

import matformer_dist.evaluation.downstream.adapter  # noqa: F401 registers itself

if __name__ == "__main__":
    cli_evaluate()
