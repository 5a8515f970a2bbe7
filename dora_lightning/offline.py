"""What can be done with a finished run: merge its adapter into the base, and talk to the model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dora_lightning.adapters import merge_adapters
from dora_lightning.backbones import DoRALlama, DoRALlava
from dora_lightning.backbones.causal_lm import generate_texts
from dora_lightning.files import write_text_atomically
from dora_lightning.pretrained import load_causal_lm, load_tokenizer, load_vision_language_model, reads_images_too
from dora_lightning.processing import image_inputs, image_token_counts, load_processor, vision_sizes
from dora_lightning.training.adapter_checkpoint import read_adapter_checkpoint
from dora_lightning.training.merging import merge_to_folder

CHAT, NONE = "chat", "none"


def merge(checkpoint: str, output: str, base: str | None = None, overwrite: bool = False) -> None:
    """Merge an adapter checkpoint into a Hugging Face folder, one tensor at a time.

    Args:
        checkpoint: adapter checkpoint (.ckpt) of a run.
        output: folder to write; transformers loads it without this library.
        base: folder or hub id of the base model; by default where the run loaded it from.
        overwrite: replace the output folder if it exists.
    """
    adapter = read_adapter_checkpoint(checkpoint)
    folder = merge_to_folder(base or adapter.base["name"], adapter, output, overwrite)
    Console().print(f"Merged model: {folder}", markup=False, highlight=False, soft_wrap=True)


def generate(
    model: str,
    prompt: str | None = None,
    prompts: str | None = None,
    image: str | None = None,
    output: str | None = None,
    template: str = CHAT,
    base: str | None = None,
    max_new_tokens: int = 128,
    num_beams: int = 1,
    temperature: float = 0.0,
    batch_size: int = 8,
) -> None:
    """Answer one prompt, a file of prompts, or, given neither, chat.

    Args:
        model: adapter checkpoint (.ckpt), merged folder, or hub id.
        prompt: one prompt.
        prompts: file with one prompt a line, or JSONL with a field "prompt".
        image: image file that each prompt, or the chat, is about, for a model that reads images.
        output: JSONL file for the answers to a file of prompts; standard output by default.
        template: "chat" for the tokenizer's chat template, "none" for the bare prompt, or a text with {prompt} in it.
        base: folder or hub id of an adapter's base model; by default where the run loaded it from.
        max_new_tokens: longest answer.
        num_beams: beams of the search; 1 is greedy.
        temperature: above 0, answers are sampled.
        batch_size: prompts answered at a time.
    """
    if prompt is not None and prompts is not None:
        raise ValueError("give one prompt or a file of prompts, not both")
    if template not in (CHAT, NONE) and "{prompt}" not in template:
        raise ValueError(f"template must be 'chat', 'none' or a text that contains {{prompt}}, got {template!r}")
    asked = [prompt] if prompt is not None else _read_prompts(Path(prompts)) if prompts is not None else None
    network, tokenizer, processor = _load(model, base)
    vision: dict[str, Any] | None = None
    picture = ""
    if image is not None:
        if processor is None:
            raise ValueError(f"{model} reads text alone: an image needs a LLaVA-style model")
        vision = dict(image_inputs(processor, image).to(network.device))
        picture = processor.image_token * image_token_counts(processor, vision_sizes(vision))[0] + "\n"
    if template == CHAT and tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer of {model} has no chat template; choose --template none or a text with {{prompt}}"
        )
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": temperature > 0}
    if temperature > 0:
        options["temperature"] = temperature

    def answer(texts: Sequence[str]) -> list[str]:
        repeated = {name: torch.cat([tensor] * len(texts)) for name, tensor in (vision or {}).items()}
        return generate_texts(network, tokenizer, texts, repeated or None, **options)

    if asked is None:
        _chat(answer, tokenizer, template, picture)
        return
    answers: list[str] = []
    for start in range(0, len(asked), batch_size):
        filled = [
            _fill(template, [{"role": "user", "content": picture + text}], tokenizer)
            for text in asked[start : start + batch_size]
        ]
        answers += answer(filled)
    if prompt is not None:
        print(answers[0].strip())
        return
    lines = "".join(
        json.dumps({"prompt": p, "output": a}, ensure_ascii=False) + "\n" for p, a in zip(asked, answers, strict=True)
    )
    if output is None:
        sys.stdout.write(lines)
    else:
        write_text_atomically(Path(output), lines)


def load_finished(model: str, base: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model to generate with, on the GPU if there is one, and its tokenizer.

    Args:
        model: adapter checkpoint (.ckpt), merged folder, or hub id.
        base: folder or hub id of an adapter's base model; None for where the run loaded it from.

    Raises:
        ValueError: the checkpoint is none of an adapter, or a base was given beside a whole model.
    """
    network, tokenizer, _ = _load(model, base)
    return network, tokenizer


def _load(model: str, base: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Any]:
    """Model, tokenizer, and the processor of a model that reads images."""
    processor: Any = None
    if model.endswith(".ckpt"):
        reads_images = read_adapter_checkpoint(model).backbone == DoRALlava.__name__
        override: dict[str, Any] = {} if base is None else {"model_name_or_path": base}
        kind = DoRALlava if reads_images else DoRALlama
        backbone = kind.load_from_checkpoint(model, map_location="cpu", weights_only=True, **override)
        network, tokenizer = backbone.language_model, backbone.tokenizer
        processor = backbone.processor if isinstance(backbone, DoRALlava) else None
        merge_adapters(network, unload=True)
    elif base is not None:
        raise ValueError("base belongs to an adapter checkpoint (.ckpt); this model is loaded as it is")
    elif reads_images_too(model):
        processor = load_processor(model)
        network, tokenizer = load_vision_language_model(model), processor.tokenizer
    else:
        network, tokenizer = load_causal_lm(model), load_tokenizer(model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cast(nn.Module, network).eval().to(device)
    return network, tokenizer, processor


def _read_prompts(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"no file of prompts at {path}")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        if path.suffix == ".jsonl":
            try:
                line = json.loads(line)["prompt"]
                if not isinstance(line, str):
                    raise TypeError(f"expected text, found {line!r}")
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f'{path}, line {number}: expected a JSON object with a field "prompt"') from error
        found.append(line)
    if not found:
        raise ValueError(f"{path} holds no prompt")
    return found


def _fill(template: str, messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    if template == CHAT:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    text = messages[-1]["content"]
    return text if template == NONE else template.replace("{prompt}", text)


def _chat(
    answer: Callable[[Sequence[str]], list[str]], tokenizer: PreTrainedTokenizerBase, template: str, picture: str
) -> None:
    """Read a line, answer it; with a chat template the conversation so far is part of each question."""
    console = Console()
    console.print("Type a message; an empty line or Ctrl-D ends.", style="dim")
    messages: list[dict[str, str]] = []
    while True:
        try:
            text = console.input("[bold]> [/bold]")
        except EOFError:
            return
        if not text.strip():
            return
        messages.append({"role": "user", "content": text if messages else picture + text})
        reply = answer([_fill(template, messages, tokenizer)])[0].strip()
        console.print(reply, markup=False, emoji=False, highlight=False, soft_wrap=True)
        messages.append({"role": "assistant", "content": reply})
