"""VeRA and DVoRA: two vectors per layer scale one frozen random pair that all layers share.

VeRA (Kopiczko et al., ICLR 2024, https://arxiv.org/abs/2310.11454) trains ``d [rank]`` and ``b [out]`` of
``B_l = diag(b) B[:out]`` and ``A_l = diag(d) A[:, :in]``. DVoRA (DoRA, section 5.4) adds DoRA's magnitude, with the
scaling 1 and the rest as in :mod:`dora_lightning.adapters.layers`.
"""

from __future__ import annotations

import math
import weakref

import torch
from torch import Tensor, nn

from dora_lightning.adapters.config import AdapterConfig
from dora_lightning.adapters.layers import DoRALinear, LoRALinear, wide_like


class SharedPair:
    """The frozen random ``A [rank, in]`` and ``B [out, rank]``, drawn as PEFT's VeRA draws them.

    It is no module: it belongs to no layer, is made again from its seed wherever it is needed, and so is never saved,
    cast, averaged or sharded. It stays fp32. To be had from :func:`shared_pair`.
    """

    def __init__(self, rank: int, out_features: int, in_features: int, seed: int) -> None:
        self.rank = rank
        self.out_features = out_features
        self.in_features = in_features
        self.seed = seed
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``A`` and ``B`` on ``device``."""
        if device not in self._on:
            # what validation draws, training must be able to use
            with torch.inference_mode(False), torch.no_grad():
                cpu = torch.device("cpu")
                if cpu not in self._on:
                    self._on[cpu] = self._draw()
                A, B = self._on[cpu]
                self._on[device] = A.to(device), B.to(device)
        return self._on[device]

    def __deepcopy__(self, memo: object) -> SharedPair:
        """Constant, so that copies of a model share it."""
        return self

    def __reduce__(self) -> tuple[object, tuple[int, int, int, int]]:
        """A pickle holds the seed."""
        return shared_pair, (self.rank, self.out_features, self.in_features, self.seed)

    def _draw(self) -> tuple[Tensor, Tensor]:
        # on the CPU whatever the default device is: another device's numbers are others
        generator = torch.Generator("cpu").manual_seed(self.seed)
        A = torch.empty(self.rank, self.in_features, dtype=torch.float32, device="cpu")
        B = torch.empty(self.out_features, self.rank, dtype=torch.float32, device="cpu")
        for matrix in (A, B):
            # the bound of nn.init.kaiming_uniform_, from a generator of its own
            bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(matrix.shape[1]))
            matrix.uniform_(-bound, bound, generator=generator)
        return A, B


_pairs: weakref.WeakValueDictionary[tuple[int, int, int, int], SharedPair] = weakref.WeakValueDictionary()


def shared_pair(rank: int, out_features: int, in_features: int, seed: int) -> SharedPair:
    """The one pair of these sizes and seed in this process.

    Args:
        rank: rank of the pair.
        out_features: the most rows of any layer.
        in_features: the most columns of any layer.
        seed: PEFT's ``projection_prng_key``.
    """
    key = (rank, out_features, in_features, seed)
    pair = _pairs.get(key)
    if pair is None:
        pair = _pairs[key] = SharedPair(*key)
    return pair


def scaled_pair(pair: SharedPair, lambda_d: Tensor, lambda_b: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    """``A_l = diag(d) A[:, :in]`` and ``B_l = diag(b) B[:out]`` of one layer."""
    A, B = pair.on(lambda_d.device)
    return lambda_d[:, None] * A[:, :in_features], lambda_b[:, None] * B[: len(lambda_b)]


class VeRALinear(LoRALinear):
    """``y = W x + b * (B (d * (A x~))) + bias``, with ``lambda_d [rank]``, ``lambda_b [out]``, and one pair for all."""

    method = "vera"

    def reset_vectors(self) -> None:
        """Constant ``d`` and zero ``b``, so that training starts at the pretrained function."""
        nn.init.constant_(self.lambda_d, self.d_initial)
        nn.init.zeros_(self.lambda_b)

    def factors(self) -> tuple[Tensor, Tensor]:
        """``diag(d) A`` and ``diag(b) B`` of this layer."""
        return scaled_pair(self.pair, self.lambda_d, self.lambda_b, self.in_features)

    def extra_repr(self) -> str:
        """Rank and the seed of the pair."""
        return f"rank={self.rank}, projection_seed={self.pair.seed}"

    def _make_parameters(self, config: AdapterConfig) -> None:
        groups = self.operator.groups(self.base_layer)
        if groups > 1:
            raise ValueError(f"one random pair for all modules does not fit a convolution with {groups} groups")
        rows, columns = self.operator.features(self.base_layer)
        most_rows, most_columns = config.resolved.get("projection", (rows, columns))
        self.pair = shared_pair(self.rank, most_rows, most_columns, config.projection_seed)
        self.scaling = 1.0
        self.d_initial = config.d_initial
        options = wide_like(self.weight)
        self.lambda_d = nn.Parameter(torch.empty(self.rank, **options))
        self.lambda_b = nn.Parameter(torch.empty(rows, **options))

    def _reset_low_rank(self) -> None:
        self.reset_vectors()

    def _watched(self) -> list[Tensor]:
        return [self.lambda_d, self.lambda_b]

    def _outputs(self, x: Tensor, bias: Tensor | None, gain: Tensor | None, x_dropped: Tensor | None) -> Tensor:
        # the vectors scale activations: diag(d) A and diag(b) B would be kept for the backward pass, layer by layer
        base, operator = self.base_layer, self.operator
        z = operator.product(base, x)
        A, B = self.pair.on(z.device)
        h = operator.down(base, x if x_dropped is None else x_dropped, A[:, : self.in_features])
        h = (h * operator.along_features(base, self.lambda_d)).to(h.dtype)
        update = operator.up(base, h, B[: self.out_features]) * operator.along_features(base, self.lambda_b)
        return operator.finish(base, z + update.to(z.dtype), gain, bias)


class DVoRALinear(VeRALinear, DoRALinear):
    """``y = g * (W x + b * (B (d * (A x~)))) + bias`` with ``g = magnitude / |W + diag(b) B diag(d) A|``."""

    method = "dvora"
