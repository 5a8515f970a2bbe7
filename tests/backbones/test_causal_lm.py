"""Losses, scores and texts against plain transformers, one sequence at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import MakeLlama, perturb_adapters
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerBase,
)

from dora_lightning import AdapterConfig, inject_adapters
from dora_lightning.backbones import prompt_cache
from dora_lightning.backbones.causal_lm import (
    check_plain_logits,
    generate_texts,
    option_log_likelihoods,
    supervised_loss,
)


@pytest.fixture(params=["tied", "untied"])
def model(request: pytest.FixtureRequest, tiny_llama: Path, untied_llama: Path) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(tiny_llama if request.param == "tied" else untied_llama)
    inject_adapters(model, AdapterConfig(rank=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    perturb_adapters(model)
    return model.eval()


@pytest.fixture
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, 384, (3, 12))
    labels = ids.clone()
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    labels[mask == 0] = -100
    labels[0, :7] = labels[2, 3:9] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


# Loss ----------------------------------------------------------------------------------------------------------------


def test_loss_and_gradients_are_those_of_transformers(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> None:
    trainable = [p for p in model.parameters() if p.requires_grad]
    expected = model(**batch).loss
    expected_gradients = torch.autograd.grad(expected, trainable)
    loss, count = supervised_loss(model, **batch)
    assert count == int((batch["labels"][:, 1:] != -100).sum())
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(torch.autograd.grad(loss, trainable), expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_logits_exist_at_supervised_positions_only(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> None:
    seen: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0].shape, output.shape]))
    _, count = supervised_loss(model, **batch)
    assert seen == [(count, 32), (count, 384)]


def test_a_batch_without_supervised_positions_has_loss_zero(
    model: LlamaForCausalLM, batch: dict[str, torch.Tensor]
) -> None:
    batch["labels"][:] = -100
    batch["labels"][:, 0] = 5  # the first token is predicted from nothing
    loss, count = supervised_loss(model, **batch)
    loss.backward()
    assert (loss.item(), count) == (0.0, 0)


# Options -------------------------------------------------------------------------------------------------------------


def log_likelihood(model: LlamaForCausalLM, ids: list[int]) -> torch.Tensor:
    """Log-likelihood of each token after the first, by one forward pass of its own."""
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    return log_probs[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]


PROMPTS = [
    "Question: is it cold or hot?\nAnswer:",
    "Hi",
    "Please choose the correct answer to the question: what has many words in a long and winding prompt?\nAnswer:",
    "x",
]
OPTIONS = [
    (" true", " false"),
    (" there", " there is", " there is more of it"),  # each one the beginning of the next
    (" hot", " cold", " a stone wall", " the correct answer", " is"),
    ("y", " y"),
]


def check_scores(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: list[str], options: list[tuple[str, ...]]
) -> list[torch.Tensor]:
    """Where the prompt's tokens begin each text, a score is the sum over the option's tokens."""
    scores = option_log_likelihoods(model, tokenizer, prompts, options)
    for prompt, texts, found in zip(prompts, options, scores, strict=True):
        start = tokenizer(prompt).input_ids
        full = [tokenizer(prompt + text).input_ids for text in texts]
        assert all(ids[: len(start)] == start for ids in full)
        expected = torch.stack([log_likelihood(model, ids)[len(start) - 1 :].sum() for ids in full])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    return scores


def test_scores_are_those_of_one_option_at_a_time(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    together = check_scores(model, tokenizer, PROMPTS, OPTIONS)
    for prompt, texts, scores in zip(PROMPTS, OPTIONS, together, strict=True):
        (alone,) = option_log_likelihoods(model, tokenizer, [prompt], [texts])
        torch.testing.assert_close(alone, scores, rtol=1e-5, atol=1e-5)


def test_tokens_that_straddle_the_border_are_those_of_the_text(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt, texts = "the correct ans", ("wer", "wer1", " x")
    start = tokenizer(prompt).input_ids
    full = [tokenizer(prompt + text).input_ids for text in texts]
    shared = next(i for i, tokens in enumerate(zip(start, *full, strict=False)) if len(set(tokens)) > 1)
    assert shared < len(start)
    (scores,) = option_log_likelihoods(model, tokenizer, [prompt], [texts])
    expected = torch.stack([log_likelihood(model, ids)[shared - 1 :].sum() for ids in full])
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def test_an_empty_option_has_a_token_to_score_too(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    # the prompt's last token is then scored with every option, which leaves their order as it is
    texts = ("", " hot", " hot or cold")
    (scores,) = option_log_likelihoods(model, tokenizer, [PROMPTS[0]], [texts])
    start = len(tokenizer(PROMPTS[0]).input_ids)
    full = [tokenizer(PROMPTS[0] + text).input_ids for text in texts]
    expected = torch.stack([log_likelihood(model, ids)[start - 2 :].sum() for ids in full])
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def test_a_tokenizer_without_a_beginning_of_text(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    one_token, options = "x", ("y", " z")
    assert len(tokenizer(one_token).input_ids) == 1
    check_scores(model, tokenizer, [one_token], [options])
    # one short prompt in a batch must not change the scores of the others
    check_scores(model, tokenizer, [one_token, PROMPTS[0]], [options, OPTIONS[0]])
    # an empty prompt: the options are scored after the beginning-of-text token
    (scores,) = option_log_likelihoods(model, tokenizer, [""], [("hot", "it is")])
    texts = [[tokenizer.bos_token_id, *tokenizer(text).input_ids] for text in ("hot", "it is")]
    torch.testing.assert_close(scores, torch.stack([log_likelihood(model, ids).sum() for ids in texts]))


def test_a_question_without_options_has_no_scores(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    alone = option_log_likelihoods(model, tokenizer, PROMPTS[:2], OPTIONS[:2])
    first, none, second = option_log_likelihoods(
        model, tokenizer, [PROMPTS[0], PROMPTS[2], PROMPTS[1]], [OPTIONS[0], (), OPTIONS[1]]
    )
    torch.testing.assert_close([first, second], alone)
    assert none.shape == (0,)
    assert [len(scores) for scores in option_log_likelihoods(model, tokenizer, PROMPTS[:2], [(), ()])] == [0, 0]


def test_the_prompt_is_read_once(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    seen: list[torch.Size] = []
    model.model.register_forward_pre_hook(lambda _, __, named: seen.append(named["input_ids"].shape), with_kwargs=True)
    heads: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: heads.append(len(inputs[0])))
    option_log_likelihoods(model, tokenizer, PROMPTS[:3], OPTIONS[:3])
    longest = max(len(tokenizer(prompt).input_ids) for prompt in PROMPTS[:3])
    (prompts, width), (rows, tail) = seen
    assert (prompts, width, rows) == (3, longest - 1, 2 + 3 + 5)
    assert tail < width / 2
    # logits for the options' tokens only
    lengths = [
        len(tokenizer(prompt + text).input_ids) - len(tokenizer(prompt).input_ids)
        for prompt, texts in zip(PROMPTS[:3], OPTIONS[:3], strict=True)
        for text in texts
    ]
    assert heads == [sum(lengths)]


def test_scores_of_a_half_precision_model_are_fp32(tiny_llama: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).eval()
    scores = option_log_likelihoods(model, tokenizer, PROMPTS[:2], OPTIONS[:2])
    full = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    for ours, theirs in zip(scores, option_log_likelihoods(full, tokenizer, PROMPTS[:2], OPTIONS[:2]), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0.03, atol=0.1)


# Texts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
def test_texts_are_those_of_one_prompt_at_a_time(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, beams: int
) -> None:
    options = {"max_new_tokens": 8, "num_beams": beams, "do_sample": False}
    together = generate_texts(model, tokenizer, PROMPTS, **options)
    assert together == [generate_texts(model, tokenizer, [prompt], **options)[0] for prompt in PROMPTS]
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    output = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
    assert together[0] == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert len(set(together)) > 1


def test_special_tokens_may_come_with_the_prompt(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    options = {"max_new_tokens": 8, "do_sample": False}
    written = generate_texts(model, tokenizer, ["<s>" + PROMPTS[0]], **options)
    assert written == generate_texts(model, tokenizer, PROMPTS[:1], **options)


BEGINNING = "Below is an instruction with a beginning that all have. Answer it:\n"


@pytest.fixture
def any_start_is_worth_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_cache, "_WORTH_A_PASS", 1)


@pytest.mark.usefixtures("any_start_is_worth_a_pass")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"num_beams": 2, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
)
def test_texts_are_the_same_with_what_prompts_share_read_once(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> None:
    # the first is nothing but what is shared, and one token
    prompts = [BEGINNING, *(BEGINNING + prompt for prompt in PROMPTS)]
    options = {"max_new_tokens": 10, "do_sample": False, **options}
    expected = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        output = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
        expected += tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    assert generate_texts(model, tokenizer, prompts, **options) == expected
    assert len(set(expected)) > 3


@pytest.mark.usefixtures("any_start_is_worth_a_pass")
def test_scores_are_the_same_with_what_prompts_share_read_once(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    check_scores(model, tokenizer, [BEGINNING + prompt for prompt in PROMPTS[:3]], OPTIONS[:3])
    check_scores(model, tokenizer, [BEGINNING, BEGINNING], [OPTIONS[0], OPTIONS[0]])


def tokens_read(model: LlamaForCausalLM) -> list[torch.Size]:
    seen: list[torch.Size] = []
    model.model.register_forward_pre_hook(lambda _, __, named: seen.append(named["input_ids"].shape), with_kwargs=True)
    return seen


def test_beams_read_a_prompt_once(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    seen = tokens_read(model)
    longest = max(len(tokenizer(prompt).input_ids) for prompt in PROMPTS)
    generate_texts(model, tokenizer, PROMPTS, num_beams=3, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert seen == [(4, longest - 1), (12, 1), (12, 1)]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_a_long_common_beginning_is_read_once(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> None:
    prompts = [4 * BEGINNING + prompt for prompt in PROMPTS]
    ids = [tokenizer(prompt).input_ids for prompt in prompts]
    shared = next(i for i, tokens in enumerate(zip(*ids, strict=False)) if len(set(tokens)) > 1)
    assert shared * 3 >= 256
    seen = tokens_read(model)
    rest = max(map(len, ids)) - shared - 1
    generate_texts(model, tokenizer, prompts, max_new_tokens=1, do_sample=False, **options)
    assert seen == [(1, shared), (4, rest), (4 * options.get("num_beams", 1), 1)]
    seen.clear()
    option_log_likelihoods(model, tokenizer, prompts, [*OPTIONS[:3], (" y", " z")])
    assert seen[:2] == [(1, shared), (4, rest)]


def test_options_that_a_cache_could_change_are_left_to_transformers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    options = {"num_beams": 2, "max_new_tokens": 4, "do_sample": False}
    expected = generate_texts(model, tokenizer, PROMPTS, **options)
    seen = tokens_read(model)
    assert generate_texts(model, tokenizer, PROMPTS, use_cache=False, **options) == expected
    assert seen[0][0] == 8


def test_a_window_of_attention_sees_what_it_would_alone(tiny_llama: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    together = generate_texts(model, tokenizer, PROMPTS, **options)
    for prompt, text in zip(PROMPTS, together, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        output = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
        assert text == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


# Architectures -------------------------------------------------------------------------------------------------------


def test_an_architecture_that_changes_its_logits_is_refused(make_llama: MakeLlama, tiny_llama: Path) -> None:
    model: Any = LlamaForCausalLM.from_pretrained(tiny_llama)
    check_plain_logits(model)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match=r"LlamaForCausalLM changes its logits \(final_logit_softcapping\)"):
        check_plain_logits(model)


def test_the_loss_matches_a_model_without_adapters_computed_by_hand(tiny_llama: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_llama).eval()
    ids = torch.tensor([[1, 40, 50, 60]])
    labels = torch.tensor([[-100, -100, 50, 60]])
    logits = model(ids).logits
    expected = (F.cross_entropy(logits[0, 1:2], ids[0, 2:3]) + F.cross_entropy(logits[0, 2:3], ids[0, 3:4])) / 2
    torch.testing.assert_close(supervised_loss(model, ids, torch.ones_like(ids), labels), (expected, 2))
