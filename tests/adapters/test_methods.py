"""Every method on every kind of layer with every initialisation: against PEFT, and against a dense float64 formula."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from dora_lightning.adapters import AdapterConfig, AdapterLayer, inject_adapters
from tests.adapters.perturbed import assert_close, perturb
from tests.adapters.zoo import KINDS, PLAIN, adapted, dense, peft_twin

# PEFT takes fan_in_fan_out from the type of the layer, and says so
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is:UserWarning"),
]
LOW_RANK = ["lora", "dora"]
INITS = ["kaiming", "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora"]
ONE_GROUP = [kind for kind, spec in KINDS.items() if spec.groups == 1]

CASES: list[tuple[str, str, dict[str, Any]]] = [
    *((method, kind, {}) for kind in KINDS for method in ("lora", "dora", "magnitude")),
    *((method, kind, {}) for kind in ONE_GROUP for method in ("vera", "dvora")),
    *((method, kind, {"init": init}) for kind in ONE_GROUP for method in LOW_RANK for init in INITS[1:]),
    *((method, "conv2d groups", {"init": "gaussian"}) for method in LOW_RANK),
    *(
        (method, kind, {"norm_axis": "in"})
        for kind in ("Linear", "Conv1D")
        for method in ("dora", "dvora", "magnitude")
    ),
    *(("dora", kind, {"detach_norm": False}) for kind in KINDS),
    *(("dvora", kind, {"detach_norm": False}) for kind in ONE_GROUP),
    ("dora", "Linear", {"detach_norm": False, "init": "pissa"}),
    ("dora", "Conv1D", {"detach_norm": False, "norm_axis": "in"}),
    *((method, kind, {"use_rslora": True, "alpha": 3.0}) for kind in ONE_GROUP for method in LOW_RANK),
]
IDS = [f"{method} {kind} {' '.join(f'{k}={v}' for k, v in options.items())}".strip() for method, kind, options in CASES]
every_case = pytest.mark.parametrize(("method", "kind", "options"), CASES, ids=IDS)


def gradients(
    layer: nn.Module, x: Tensor, dy: Tensor, parameters: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    inputs = {"x": x.clone().requires_grad_()} if x.is_floating_point() else {}
    y = layer(inputs.get("x", x))
    wanted = parameters | inputs
    found = torch.autograd.grad(y, list(wanted.values()), dy)
    return y.detach(), {name: g.reshape(-1) for name, g in zip(wanted, found, strict=True)}


@every_case
def test_a_dense_formula(method: str, kind: str, options: dict[str, Any]) -> None:
    layer, x = adapted(kind, method, **options)
    expected, leaves = dense(kind, layer, x)
    dy = torch.randn(expected.shape)
    own = dict(layer.named_parameters(recurse=False))
    y, found = gradients(layer, x, dy, own)
    assert_close(y, expected.detach(), 1e-5)
    assert y.dtype == torch.float32
    wanted = {name: leaf for name, leaf in leaves.items() if name != "merged"}
    assert found.keys() == wanted.keys()
    for name, g in zip(wanted, torch.autograd.grad(expected, list(wanted.values()), dy.double()), strict=True):
        assert_close(found[name], g.reshape(-1), 1e-5)
    # with float64 nothing but rounding is left
    assert_close(layer.double()(x.double() if x.is_floating_point() else x).detach(), expected.detach(), 1e-9)


@every_case
def test_starts_at_the_pretrained_function(method: str, kind: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    base, x = KINDS[kind].make(), KINDS[kind].inputs()
    expected = base(x)
    rank = {} if method == "magnitude" else {"rank": 4}
    config = AdapterConfig(method=method, target_modules=["0"], **rank, **options)
    model = inject_adapters(nn.Sequential(base), config)
    assert_close(model(x), expected, 1e-5)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    y = model(x)
    found = torch.autograd.grad(y, [dict(model.named_parameters())[name] for name in trained], torch.randn(y.shape))
    assert any(g.any() for g in found)


@every_case
def test_merged(method: str, kind: str, options: dict[str, Any]) -> None:
    layer, x = adapted(kind, method, **options)
    _, leaves = dense(kind, layer, x)
    before = layer.base_layer.weight
    bits = before.clone()
    y = layer(x).detach()
    layer.merge()
    assert_close(layer.weight, leaves["merged"].detach(), 1e-6)
    assert layer.weight.is_contiguous()
    with torch.no_grad():
        assert_close(layer(x), y, 1e-5)
    layer.unmerge()
    assert layer.base_layer.weight is before
    assert torch.equal(before, bits)
    assert torch.equal(layer(x), y)


WATCHED = [
    *(("dora", kind, {}) for kind in KINDS),
    *(("dvora", kind, {}) for kind in ONE_GROUP),
    *(("dora", kind, {"init": "pissa"}) for kind in ONE_GROUP),
]


@pytest.mark.parametrize(("method", "kind", "options"), WATCHED, ids=str)
def test_a_norm_is_never_stale(method: str, kind: str, options: dict[str, Any]) -> None:
    layer, x = adapted(kind, method, **options)
    own = dict([*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)])
    for name, tensor in {**own, "base": layer.base_layer.weight}.items():
        before = layer(x)
        with torch.no_grad():
            tensor.mul_(1.5)
        after = layer(x)
        assert not torch.equal(after, before), name
        # a copy has an empty cache
        assert torch.equal(after, copy.deepcopy(layer)(x)), name


PEFT_CASES = [
    *((method, kind, "kaiming") for kind in [*PLAIN, "Embedding padding"] for method in LOW_RANK),
    *(("vera", kind, "kaiming") for kind in ("Linear", "Conv1D")),
    # OLoRA of a Conv1D fails in PEFT, which factors the weight as it is stored, with in and out exchanged
    *((method, kind, "pissa") for kind in ("Linear", "Conv1D") for method in LOW_RANK),
    *((method, "Linear", "olora") for method in LOW_RANK),
]


@pytest.mark.parametrize(("method", "kind", "init"), PEFT_CASES)
def test_peft(method: str, kind: str, init: str) -> None:
    layer, x = adapted(kind, method, **({} if init == "kaiming" else {"init": init}))
    options = {"init_lora_weights": init} if init != "kaiming" else {}
    twin, parameters = peft_twin(kind, layer, **options)
    dy = torch.randn(layer(x).shape)
    expected, theirs = gradients(twin, x, dy, parameters)
    y, ours = gradients(layer, x, dy, {name: getattr(layer, name) for name in parameters})
    assert_close(y, expected, 2e-5)
    assert ours.keys() == theirs.keys()
    for name, g in theirs.items():
        assert_close(ours[name], g, 5e-5)


DROPPED = [
    *((method, kind) for kind in PLAIN if kind != "Embedding" for method in LOW_RANK),
    *(("vera", kind) for kind in ("Linear", "Conv1D")),
]


@pytest.mark.parametrize(("method", "kind"), DROPPED)
def test_peft_with_the_same_dropout_mask(method: str, kind: str) -> None:
    layer, x = adapted(kind, method, dropout=0.3, **({"exact_dropout": True} if method == "dora" else {}))
    option = "vera_dropout" if method == "vera" else "lora_dropout"
    twin, parameters = peft_twin(kind, layer, **{option: 0.3})
    dy = torch.randn(layer(x).shape)
    torch.manual_seed(3)
    expected, theirs = gradients(twin, x, dy, parameters)
    torch.manual_seed(3)
    y, ours = gradients(layer, x, dy, {name: getattr(layer, name) for name in parameters})
    assert_close(y, expected, 2e-5)
    for name, g in theirs.items():
        assert_close(ours[name], g, 5e-5)
    assert not torch.allclose(layer.eval()(x), y)


@pytest.mark.parametrize("method", ["lora", "dora", "dvora"])
def test_what_is_looked_up_is_not_dropped(method: str) -> None:
    layer, x = adapted("Embedding", method, dropout=0.5, **({"exact_dropout": True} if method == "dora" else {}))
    assert torch.equal(layer(x), layer.eval()(x))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_first_values_are_those_of_peft(init: str) -> None:
    torch.manual_seed(0)
    base = nn.Linear(12, 10)
    layer = inject_adapters(nn.Sequential(nn.Linear(12, 10)), AdapterConfig(rank=4, init=init))[0]
    assert isinstance(layer, AdapterLayer)
    layer.base_layer.load_state_dict(base.state_dict())
    layer.reset_parameters()
    given = {name: p.detach().clone() for name, p in layer.named_parameters(recurse=False)}
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], use_dora=True, init_lora_weights=init)
    twin = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
    assert_close(given["lora_A"], twin.lora_A["default"].weight, 1e-5)
    assert_close(given["lora_B"], twin.lora_B["default"].weight, 1e-5)
    assert_close(given["magnitude"], twin.lora_magnitude_vector["default"].weight, 1e-5)


@pytest.mark.parametrize(
    ("method", "kind", "options", "reason"),
    [
        (
            "dora",
            "conv2d groups",
            {"rank": 3},
            "0, a Conv2d: the rank must be a multiple of the convolution's 2 groups",
        ),
        ("dora", "conv2d groups", {"init": "pissa"}, "init='pissa' is made for one matrix; .* 2 groups has several"),
        ("lora", "conv2d groups", {"init": "orthogonal"}, "init='orthogonal' is made for one matrix"),
        ("dvora", "conv2d groups", {}, "one random pair for all modules does not fit a convolution with 2 groups"),
        ("dora", "Linear", {"init": "olora", "rank": 11}, "init='olora' needs a rank of at most 10, got 11"),
        ("dora", "conv2d", {"norm_axis": "in"}, "norm_axis='in' scales the inputs of a linear layer; .* Conv2d"),
        ("magnitude", "Embedding", {"norm_axis": "in"}, "norm_axis='in' scales the inputs of a linear layer"),
    ],
)
def test_combinations_without_sense(method: str, kind: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        adapted(kind, method, **options)


def test_an_embedding_that_rewrites_its_weight() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=1.0))
    with pytest.raises(ValueError, match="matches 0, a Embedding; only linear layers, convolutions and embeddings"):
        inject_adapters(model, AdapterConfig(target_modules=["0"]))


def test_reads_through() -> None:
    conv = adapted("conv2d groups", "dora")[0]
    assert (conv.stride, conv.groups, conv.in_channels) == ((1, 1), 2, 8)
    embedding = adapted("Embedding", "dora")[0]
    assert (embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx) == (20, 10, None)
    assert (embedding.in_features, embedding.out_features) == (20, 10)
    assert adapted("Conv1D", "dora")[0].nf == 10
    with pytest.raises(AttributeError, match="num_embeddings"):
        _ = conv.num_embeddings


def test_an_embedding_that_scales_what_it_looks_up() -> None:
    class Scaled(nn.Embedding):
        embed_scale = torch.tensor(3.0)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.embed_scale

    torch.manual_seed(0)
    layer = inject_adapters(nn.Sequential(Scaled(20, 10)), AdapterConfig(rank=4, target_modules=["0"]))[0]
    perturb(layer)
    x = torch.randint(0, 20, (4, 7))
    assert_close(layer(x), 3 * layer.merged_weight()[x], 1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_first_values_stay_fp32_and_are_part_of_the_state(init: str) -> None:
    layer, x = adapted("Linear", "dora", init=init)
    kept = {name: getattr(layer, name).clone() for name in ("init_A", "init_B")}
    assert {"init_A", "init_B"} <= layer.state_dict().keys()
    assert not any(name.startswith("init_") for name, _ in layer.named_parameters())
    expected = layer(x)
    other = adapted("Linear", "dora", init=init)[0]
    other(x)
    layer.to(torch.bfloat16)
    assert all(torch.equal(getattr(layer, name), value) for name, value in kept.items())
    assert_close(layer(x.bfloat16()), expected, 3e-2)
    with torch.no_grad():
        layer.init_A.mul_(2)
    other.load_state_dict(layer.state_dict())
    fresh = adapted("Linear", "dora", init=init)[0]
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), fresh(x))
    assert not torch.allclose(other(x), expected)
