"""Nested models of matformer_dist, for transformers: one set of weights, many submodels.

```python
model = AutoModelForCausalLM.from_pretrained(PATH, trust_remote_code=True, submodel="M")
model.set_submodel("S:2,M:2")       # or a list of one name a layer; None for all that is held
model.generate(**prompt, assistant_model=model.at("S"))
```
Granularity i of an FFN is its first m_i neurons, so that a submodel is a prefix of every FFN's
weights: nothing is copied, and nothing beyond it computed. All weights stay in memory.

Which submodel runs is state of a model object, and saved with its configuration, because
transformers' interfaces (generate, pipelines, its evaluation harnesses) have no place for an
argument. `at` makes another object for another submodel, so that two can run side by side.

Legend: D width of the model, F neurons held, m neurons that run.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM, Starcoder2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.starcoder2.modeling_starcoder2 import Starcoder2MLP

from .configuration_matformer import MatformerLlamaConfig, MatformerStarcoder2Config, notation


class NestedLlamaMLP(LlamaMLP):
    width: int  # m, set by set_submodel

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D] by the first m neurons."""
        m = self.width
        if m == self.intermediate_size:
            return super().forward(x)
        gate = F.linear(x, _weight(self.gate_proj)[:m])
        up = F.linear(x, _weight(self.up_proj)[:m])
        return F.linear(self.act_fn(gate) * up, _weight(self.down_proj)[:, :m])


class NestedStarcoder2MLP(Starcoder2MLP):
    width: int

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., D] -> [..., D] by the first m neurons."""
        m = self.width
        if m == self.c_fc.out_features:
            return super().forward(hidden_states)
        activation = self.act(F.linear(hidden_states, _weight(self.c_fc)[:m]))
        out = F.linear(activation, _weight(self.c_proj)[:, :m])
        return F.dropout(out, p=self.residual_dropout, training=self.training)


def _weight(linear: nn.Module) -> Tensor:
    """The weight of a layer that is nothing but a product with it."""
    if type(linear) is not nn.Linear:
        raise TypeError(
            f"a submodel narrower than the weights cannot run through a {type(linear).__name__}: "
            "quantize or adapt the model at the submodel that fills its weights, or extract the "
            "submodel on its own"
        )
    return linear.weight


class NestedModel(nn.Module):
    """What both architectures add to transformers' own."""

    config: Any
    model: Any
    post_init: Any

    def _nest(self, mlp: type[nn.Module]) -> None:
        """Give every layer an FFN of the width that it holds."""
        for layer, name in zip(self.model.layers, self.config.granularities, strict=True):
            described = copy.copy(self.config)
            described.intermediate_size = self.config.width(name)
            layer.mlp = mlp(described)
        self.set_submodel(self.config.submodel)

    @property
    def submodel(self) -> str:
        """What runs: a granularity's name, or runs of layers such as "S:2,M:2"."""
        return str(self.config.submodel)

    def set_submodel(self, submodel: str | Sequence[str] | None) -> None:
        """Run `submodel` from now on: "M", "S:2,M:2", ["S", "S", "M", "M"], or None for all.

        ValueError for one that is none of this model's, or wider than its weights.
        """
        names = self.config.parse(submodel)
        for layer, name in zip(self.model.layers, names, strict=True):
            layer.mlp.width = self.config.width(name)
        self.config.submodel = notation(names)

    def at(self, submodel: str | Sequence[str] | None) -> Any:
        """A model that runs `submodel`, over the very parameters of this one: no second copy.

        Modules and settings are its own. What moves or converts one model's weights does the
        other's. ValueError as `set_submodel`.
        """
        self.config.parse(submodel)
        shared: dict[int, Any] = {id(parameter): parameter for parameter in self.parameters()}
        # Buffers are replaced where they move, parameters are not: their modules are shared whole.
        shared |= {id(m): m for m in self.modules() if [*m.buffers(recurse=False)]}
        other = copy.deepcopy(self, shared)
        other.set_submodel(submodel)
        return other


class MatformerLlamaForCausalLM(NestedModel, LlamaForCausalLM):
    config_class = MatformerLlamaConfig

    def __init__(self, config: MatformerLlamaConfig) -> None:
        super().__init__(config)
        self._nest(NestedLlamaMLP)
        self.post_init()


class MatformerStarcoder2ForCausalLM(NestedModel, Starcoder2ForCausalLM):
    config_class = MatformerStarcoder2Config

    def __init__(self, config: MatformerStarcoder2Config) -> None:
        super().__init__(config)
        self._nest(NestedStarcoder2MLP)
        self.post_init()
