"""A tiny LLaMA with a tokenizer in a folder, as a pretrained model would come, and a few commonsense questions.

The library is imported inside the fixtures: jaxtyping's import hook is set after this file is read.
"""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# tensors this small are ten times slower on two threads that other processes share; child processes read the variable
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

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

MakeLlama = Callable[..., Path]


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


@pytest.fixture(scope="session")
def make_llama(tmp_path_factory: pytest.TempPathFactory) -> MakeLlama:
    """Makes a tiny LLaMA in a folder of its own; see :func:`save_llama` for what can be chosen."""

    def make(**changes: Any) -> Path:
        return save_llama(tmp_path_factory.mktemp("llama"), **changes)

    return make


@pytest.fixture(scope="session")
def tiny_llama(make_llama: MakeLlama) -> Path:
    """A tiny LLaMA with tied embeddings and a chat template."""
    return make_llama()


@pytest.fixture(scope="session")
def untied_llama(make_llama: MakeLlama) -> Path:
    """A tiny LLaMA with an output embedding of its own, and no chat template."""
    return make_llama(tied=False, chat_template=None)


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


@pytest.fixture(scope="session")
def commonsense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLM-Adapters' layout with two tasks: 24 rows each to train on, 5 (boolq) and 4 (ARC-Easy) to test on."""
    folder = tmp_path_factory.mktemp("commonsense")
    for task, row, tests in (("boolq", boolq_row, 5), ("ARC-Easy", arc_row, 4)):
        write_rows(folder / task / "train.json", [row(number) for number in range(24)])
        write_rows(folder / task / "test.json", [row(number) for number in range(100, 100 + tests)])
    return folder


MakeBackbone = Callable[..., Any]
MakeData = Callable[..., Any]
MakeTrainer = Callable[..., Any]


@pytest.fixture
def make_backbone(tiny_llama: Path) -> MakeBackbone:
    """Makes a DoRALlama on the tiny LLaMA, or on the folder that is given; adapter options go by ``adapter``."""
    from torch.optim import AdamW

    from dora_lightning import AdapterConfig
    from dora_lightning.backbones import DoRALlama

    def make(
        folder: Path | None = None, adapter: dict[str, Any] | None = None, lr: float = 0.01, **options: Any
    ) -> Any:
        config = {"rank": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]} | (adapter or {})
        options.setdefault("optimizer", partial(AdamW, lr=lr))
        torch.manual_seed(0)
        return DoRALlama(str(folder or tiny_llama), AdapterConfig(**config), **options)

    return make


@pytest.fixture
def make_data(tiny_llama: Path, commonsense_folder: Path) -> MakeData:
    """Makes a CommonsenseDataModule: 40 samples to train on, 8 for validation, 9 to test on."""
    from datamodules import CommonsenseDataModule

    def make(**options: Any) -> Any:
        defaults: dict[str, Any] = {"data_dir": str(commonsense_folder), "val_size": 8, "batch_size": 4}
        defaults |= {"template": "plain", "eval_batch_size": 4}
        return CommonsenseDataModule(str(tiny_llama), **(defaults | options))

    return make


@pytest.fixture
def make_trainer(tmp_path: Path) -> MakeTrainer:
    """Makes a quiet Trainer for one CPU process that writes to ``tmp_path`` and saves no checkpoints by itself."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    def make(**options: Any) -> Any:
        saves = any(isinstance(callback, ModelCheckpoint) for callback in options.get("callbacks", []))
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": saves,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
            "num_sanity_val_steps": 0,
        }
        return Trainer(**(defaults | options))

    return make


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
