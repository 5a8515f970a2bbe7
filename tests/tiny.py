"""What tests of several folders share: tiny models and data in folders, and the types of the fixtures that make them.

Nothing of the library is imported here: jaxtyping's import hook is set after this file is read.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
TEXTS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction: ### Response: Question: Answer: user: assistant:",
    "Please choose the correct answer to the question: Answer1: Answer2: Answer3: Answer format: is it cold or hot?",
    "Please answer the following question with true or false, question: the correct answer is answer1 answer2 true",
]


def save_tokenizer(folder: Path, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """A byte-level BPE tokenizer of 384 tokens that begins every text with ``<s>``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=chat_template
    )
    fast.save_pretrained(folder)


def save_llama(
    folder: Path,
    tied: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    chat_template: str | None = CHAT_TEMPLATE,
    shard_size: str = "5GB",
    **changes: Any,
) -> Path:
    """A random LLaMA of two layers with its tokenizer, saved as a Hugging Face folder."""
    options: dict[str, Any] = {
        "vocab_size": 384,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        # wide enough that the logits differ from token to token
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": tied,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**(options | changes)))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    save_tokenizer(folder, chat_template)
    return folder


MakeLlama = Callable[..., Path]
MakeBackbone = Callable[..., Any]
MakeData = Callable[..., Any]
MakeTrainer = Callable[..., Any]
RunCLI = Callable[..., None]


def boolq_row(number: int) -> dict[str, str]:
    answer = "true" if number % 3 else "false"
    question = f"is {number} cold{' or hot' * (number % 4)}?"
    return {
        "instruction": (
            "Please answer the following question with true or false, "
            f"question: {question}\n\nAnswer format: true/false"
        ),
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


def arc_row(number: int) -> dict[str, str]:
    answer = f"answer{number % 3 + 1}"
    return {
        "instruction": (
            f"Please choose the correct answer to the question: is {number} hot?\n\n"
            "Answer1: cold Answer2: hot Answer3: it is\n\nAnswer format: answer1/answer2/answer3"
        ),
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))


def perturb_adapters(model: torch.nn.Module, seed: int = 0) -> None:
    """Put something into every adapter, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("lora_B"):
                parameter.copy_(0.1 * noise)
            elif name.endswith("magnitude"):
                parameter.mul_(1 + 0.1 * noise)
