"""Feed-forward layers: the gated one (Shazeer 2020, "GLU Variants Improve Transformer") and the first one."""

import functools

import jax
from flax import nnx

from jaxllm.models.layers.linear import Linear
from jaxllm.models.layers.param import Initializer

# The checkpoint's `hidden_act` -> function. "gelu" is the exact one; the other two name its tanh approximation.
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class GatedMLP(nnx.Module):
    def __init__(
        self, hidden_size: int, intermediate_size: int, *, act: str, bias: bool, dtype, initializer: Initializer
    ):
        self.act = act
        self.gate_up = Linear(
            hidden_size,
            {"gate": intermediate_size, "up": intermediate_size},
            axes=("gate_up", "embed"),
            dtype=dtype,
            initializer=initializer,
            bias=bias,
        )
        self.down = Linear(
            intermediate_size, hidden_size, axes=("embed", "mlp"), dtype=dtype, initializer=initializer, bias=bias
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [T, D] -> [T, D]: down(act(gate(x)) * up(x))."""
        gate, up = self.gate_up.split(x)
        return self.down(ACTIVATIONS[self.act](gate) * up)


class MLP(nnx.Module):
    """The Transformer's own, without a gate (Vaswani et al. 2017)."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, act: str, bias: bool, dtype, initializer: Initializer
    ):
        self.act = act
        options = dict(dtype=dtype, initializer=initializer, bias=bias)
        self.up = Linear(hidden_size, intermediate_size, axes=("mlp", "embed"), **options)
        self.down = Linear(intermediate_size, hidden_size, axes=("embed", "mlp"), **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [T, D] -> [T, D]: down(act(up(x)))."""
        return self.down(ACTIVATIONS[self.act](self.up(x)))
