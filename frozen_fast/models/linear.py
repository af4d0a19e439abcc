"""Linear layers through frozen_kernels.products.linear, ours and those of a transformers model."""

from __future__ import annotations

from torch import Tensor, nn

from frozen_kernels import linear


class Linear(nn.Linear):
    """torch.nn.Linear, computed by frozen_kernels.products.linear."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return linear(x, self.weight, self.bias)


def replace_linear_layers(model: nn.Module) -> None:
    """Put a Linear with the same parameters in the place of every torch.nn.Linear inside a model."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                layer = Linear(child.in_features, child.out_features, child.bias is not None, device="meta")
                layer.weight, layer.bias = child.weight, child.bias
                setattr(parent, name, layer.train(child.training))
