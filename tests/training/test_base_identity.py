"""A base model is recognised whatever its dtype, and never taken for another one."""

from pathlib import Path

import pytest
import torch
from tiny import MakeLlama
from transformers import LlamaForCausalLM

from dora_lightning import AdapterConfig, inject_adapters
from dora_lightning.training import base_identity as identities
from dora_lightning.training.base_identity import base_identity, check_same_base, check_weight_of_base, weights_digest


def load(folder: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    return inject_adapters(LlamaForCausalLM.from_pretrained(folder, dtype=dtype), AdapterConfig(rank=2))


def test_identity_names_weights_as_the_base_does_and_holds_plain_containers(tiny_llama: Path, tmp_path: Path) -> None:
    identity = base_identity(load(tiny_llama), "base")
    plain = LlamaForCausalLM.from_pretrained(tiny_llama)
    assert identity["samples"].keys() == dict(plain.named_parameters()).keys()
    torch.save(identity, tmp_path / "identity.pt")
    check_same_base(
        torch.load(tmp_path / "identity.pt", weights_only=True), base_identity(plain.requires_grad_(False), "")
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_weights_pass_in_any_dtype(tiny_llama: Path, dtype: torch.dtype) -> None:
    saved = base_identity(load(tiny_llama), "base")
    present = base_identity(load(tiny_llama, dtype), "base")
    check_same_base(saved, present)
    check_same_base(present, saved)


def test_two_half_precisions_of_the_same_weights_pass(tiny_llama: Path) -> None:
    check_same_base(
        base_identity(load(tiny_llama, torch.float16), "a"), base_identity(load(tiny_llama, torch.bfloat16), "b")
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_seed_is_refused_by_name(tiny_llama: Path, make_llama: MakeLlama, dtype: torch.dtype) -> None:
    saved, present = base_identity(load(tiny_llama), "mine"), base_identity(load(make_llama(seed=1), dtype), "yours")
    with pytest.raises(ValueError, match=r"another base model: 'mine', not 'yours' \(model.embed_tokens.weight"):
        check_same_base(saved, present)


@pytest.mark.parametrize("position", [0, 17, 383])
def test_one_changed_row_is_enough_to_be_refused(tiny_llama: Path, position: int) -> None:
    saved = base_identity(load(tiny_llama), "mine")
    other = load(tiny_llama)
    with torch.no_grad():
        other.model.embed_tokens.weight[position, 5:9] += 1e-4
    with pytest.raises(ValueError, match=r"embed_tokens.weight holds other values"):
        check_same_base(saved, base_identity(other, "yours"))


def rotary_permutation(rows: int, heads: int) -> torch.Tensor:
    """The order of rows in Meta's files of ``q_proj``, as places in Hugging Face's."""
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moved", ["rows", "heads", "two numbers"])
def test_the_same_numbers_in_another_order_are_refused(tiny_llama: Path, moved: str, dtype: torch.dtype) -> None:
    saved = base_identity(load(tiny_llama), "mine")
    other = load(tiny_llama, dtype)
    weight = other.model.layers[0].self_attn.q_proj.base_layer.weight
    rows, before = len(weight), weight.detach().clone()
    with torch.no_grad():
        if moved == "rows":
            weight.copy_(before[rotary_permutation(rows, other.config.num_attention_heads)])
        elif moved == "heads":
            weight.copy_(before.roll(rows // other.config.num_attention_heads, 0))
        else:
            weight[0, 0:2], weight[5, 2:4] = before[5, 2:4], before[0, 0:2]
    assert torch.equal(weight.flatten().sort().values, before.flatten().sort().values)
    if dtype == torch.float32 or moved != "two numbers":  # in another dtype that is within rounding of the whole
        with pytest.raises(ValueError, match=r"q_proj.weight holds other values"):
            check_same_base(saved, base_identity(other, "yours"))


def test_a_checkpoint_of_an_older_version_is_compared_by_its_sums_and_the_log_says_so(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(identities, "rank_zero_info", told.append)
    monkeypatch.setattr(identities, "_weakly_compared", set())
    saved = base_identity(load(tiny_llama), "mine")
    for added in ("digests", "projections"):
        del saved[added]
    # as older versions summed: eight bytes at a time, wrapping around
    weight = LlamaForCausalLM.from_pretrained(tiny_llama).model.norm.weight.detach()
    words = weight.numpy().view("int64").astype(object).sum()
    assert saved["checksums"]["model.norm.weight"] == (words + 2**63) % 2**64 - 2**63
    for _ in range(2):
        check_same_base(saved, base_identity(load(tiny_llama), "yours"))
        check_same_base(saved, base_identity(load(tiny_llama, torch.bfloat16), "yours"))
    assert len(told) == 1
    assert "written by an older version: its base 'mine' is compared by sums" in told[0]
    other = load(tiny_llama)
    with torch.no_grad():
        other.model.norm.weight[3] += 1e-4
    with pytest.raises(ValueError, match=r"norm.weight holds other values"):
        check_same_base(saved, base_identity(other, "yours"))


def test_weights_and_buffers_of_a_model_have_one_digest() -> None:
    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(6, 6, bias=False), torch.nn.BatchNorm1d(6))

    digest = weights_digest(model())
    assert weights_digest(model()) == digest
    permuted, buffered, shaped, cast = model(), model(), model(), model().bfloat16()
    permuted[0].weight.data = permuted[0].weight.data.flip(0)
    buffered[1].running_mean[2] = 1.0
    shaped[0].weight.data = shaped[0].weight.data.view(4, 9)
    digests = {weights_digest(other) for other in (permuted, buffered, shaped, cast)}
    assert len(digests) == 4
    assert digest not in digests


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 3}, {"intermediate_size": 40}, {"tied": False}])
def test_other_shapes_are_refused(tiny_llama: Path, make_llama: MakeLlama, changes: dict[str, int]) -> None:
    saved, present = base_identity(load(tiny_llama), "mine"), base_identity(load(make_llama(**changes)), "yours")
    for one, two in ((saved, present), (present, saved)):
        with pytest.raises(ValueError, match="another base model"):
            check_same_base(one, two)


def test_one_weight_can_be_checked_by_itself() -> None:
    model = torch.nn.Linear(5, 3).requires_grad_(False)
    saved = base_identity(model, "mine")
    check_weight_of_base(saved, "weight", model.weight, "yours")
    check_weight_of_base(saved, "never recorded", model.weight, "yours")
    with pytest.raises(ValueError, match=r"'mine', not 'yours' \(weight holds other values"):
        check_weight_of_base(saved, "weight", model.weight + 1, "yours")


def test_a_weight_may_be_a_view_at_an_odd_place() -> None:
    # a checksum reads eight bytes at a time
    whole = torch.randn(11, dtype=torch.bfloat16)
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(whole[1:8], requires_grad=False)
    saved = base_identity(model, "mine")
    check_weight_of_base(saved, "weight", whole[1:8].clone(), "yours")
    with pytest.raises(ValueError, match="another base"):
        check_weight_of_base(saved, "weight", whole[2:9], "yours")
