"""The verbs ``merge`` and ``generate``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from dora_lightning.chat_templates import apply_chat_template
from dora_lightning.files import json_rows, read_text
from dora_lightning.messages import check_real, check_whole
from dora_lightning.offline.checkpoints import base_of
from dora_lightning.offline.kept_answers import KeptAnswers, model_stamp
from dora_lightning.offline.models import TextModel, load_model
from dora_lightning.offline.shown import Shown
from dora_lightning.terminal import say
from dora_lightning.training.adapter_checkpoint import read_adapter_checkpoint
from dora_lightning.training.merging import merge_to_folder
from dora_lightning.training.trained_inputs import differences

CHAT, NONE = "chat", "none"
_FORM = [{"role": "user", "content": "{prompt}"}]


def merge(checkpoint: str, output: str, base: str | None = None, overwrite: bool = False) -> None:
    """Merge an adapter checkpoint into a Hugging Face folder, one tensor at a time.

    Args:
        checkpoint: adapter checkpoint (.ckpt) of a run.
        output: folder to write; transformers loads it without this library.
        base: folder or hub id of the base model; by default where the run loaded it from.
        overwrite: replace the output folder if it exists; only one that merging made, and that holds no other files.
    """
    adapter = read_adapter_checkpoint(checkpoint)
    folder = merge_to_folder(base_of(checkpoint, adapter, base), adapter, output, overwrite)
    say(f"Merged model: {folder}")


def generate(
    model: str,
    prompt: str | None = None,
    prompts: str | None = None,
    image: list[str] | str | None = None,
    video: str | None = None,
    frames: int | None = None,
    every: float | None = None,
    features: list[str] | str | None = None,
    rows: int | None = None,
    image_aspect_ratio: Literal["pad", "plain"] | None = None,
    exif_rotation: bool | None = None,
    output: str | None = None,
    template: str | None = None,
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
        image: image file that each prompt, or the chat, is about, or several as '[a.jpg, b.jpg]'; for a LLaVA-style
            model, or a VL-BART with a vision tower.
        video: video file, likewise.
        frames: frames of the video, evenly spread over it; LLaVA-style models look at 8 unless told otherwise.
        every: seconds from one frame of the video to the next, instead; 1.5 for VL-BART unless told otherwise.
        features: file of features computed before (.h5, .npz, .safetensors), for VL-BART, or one for each of several
            images. An .npz has a video's, as published, and so has a folder whose features.json says "every".
        rows: rows that features are brought to: a grid is pooled, a video's are filled up with zeros or pooled over
            time. By default as published: 36 if an image has more, 64 for a video.
        image_aspect_ratio: pad puts images in the middle of a square, plain leaves them to the model's image processor.
            By default as the model was trained; where nothing tells, pad for LLaVA-1.5 and plain for LLaVA-NeXT.
        exif_rotation: turn photos upright as their EXIF data say. By default as the model was trained; where nothing
            tells, false, as published.
        output: JSONL file for the answers to a file of prompts; standard output by default. Answers are kept in
            {output}.unfinished as they come, and the same command goes on from them.
        template: "chat" for the tokenizer's chat template, "none" for the bare prompt, or a text with {prompt} in it.
            By default the prompt that the model was trained with; where nothing tells, the chat template, or the bare
            prompt for VL-BART, which has none.
        base: folder or hub id of an adapter's base model; by default where the run loaded it from.
        max_new_tokens: longest answer.
        num_beams: beams of the search; 1 is greedy.
        temperature: above 0, answers are sampled.
        batch_size: prompts answered at a time.
    """
    check_whole(1, max_new_tokens=max_new_tokens, num_beams=num_beams, batch_size=batch_size)
    check_real(0, temperature=temperature)
    if prompt is not None and prompts is not None:
        raise ValueError("give one prompt or a file of prompts, not both")
    if template not in (None, CHAT, NONE) and "{prompt}" not in template:
        raise ValueError(f"template must be 'chat', 'none' or a text that contains {{prompt}}, got {template!r}")
    shown = Shown(_listed(image), video, frames, every, _listed(features), rows, image_aspect_ratio, exif_rotation)
    asked = [prompt] if prompt is not None else _read_prompts(Path(prompts)) if prompts is not None else None
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": temperature > 0}
    if temperature > 0:
        options["temperature"] = temperature
    kept = None
    if output is not None:
        if asked is None or prompt is not None:
            raise ValueError("output is for the answers to a file of prompts, and no prompts are given")
        made_by = {"model": model, "files": model_stamp(model), "base": base, "template": template}
        kept = KeptAnswers(Path(output), asked, made_by | {"shown": asdict(shown)} | options)
    loaded = load_model(model, base)
    template = _template_for(loaded, template)
    _compare_prompts(loaded, template)
    vision, picture = loaded.look_at(shown)

    def answer(texts: Sequence[str]) -> list[str]:
        return loaded.answer(texts, vision, **options)

    if asked is None:
        _chat(answer, loaded.tokenizer, template, picture)
        return
    begun = len(kept.answers) if kept is not None else 0
    for start in range(begun, len(asked), batch_size):
        batch = asked[start : start + batch_size]
        filled = [_fill(template, [{"role": "user", "content": picture + text}], loaded.tokenizer) for text in batch]
        answers = answer(filled)
        if prompt is not None:
            print(answers[0].strip())
        elif kept is not None:
            kept.add(answers)
        else:
            for text, reply in zip(batch, answers, strict=True):
                print(json.dumps({"prompt": text, "output": reply}, ensure_ascii=False), flush=True)
    if kept is not None:
        kept.finish()


def _listed(files: list[str] | str | None) -> list[str]:
    return [files] if isinstance(files, str) else files or []


def _template_for(model: TextModel, template: str | None) -> str:
    if template is None and "prompt" in model.trained:
        trained = str(model.trained["prompt"])
        # the chat template holds the whole of a conversation
        return CHAT if _chat_form(model.tokenizer) == trained else trained
    if template is None and model.tokenizer.chat_template is None and model.bare_prompts:
        return NONE
    template = template or CHAT
    if template == CHAT and model.tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer of {model.name} has no chat template; choose --template none or a text with {{prompt}}"
        )
    return template


def _chat_form(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What the chat template puts around a message; None without one, or if it refuses a lone message."""
    try:
        return _fill(CHAT, _FORM, tokenizer) if tokenizer.chat_template else None
    except ValueError:
        return None


def _compare_prompts(model: TextModel, template: str) -> None:
    asked = _fill(template, _FORM, model.tokenizer)
    for line in differences({"prompt": model.trained.get("prompt", asked)}, {"prompt": asked}):
        model.say(line)


def _read_prompts(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"no file of prompts at {path}")
    if path.suffix in (".jsonl", ".json"):
        found = [_prompt_of(row, f"{path}, {place}") for place, row in json_rows(path, 'rows with a field "prompt"')]
    else:
        found = [line for line in read_text(path).split("\n") if line.strip()]
    if not found:
        raise ValueError(f"{path} holds no prompt")
    return found


def _prompt_of(row: Any, place: str) -> str:
    if isinstance(row, ValueError):
        raise ValueError(f"{place}: {row}")
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, str):
        raise ValueError(f'{place}: expected a JSON object with text in the field "prompt", found {row!r:.80}')
    return prompt


def _fill(template: str, messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    if template == CHAT:
        return apply_chat_template(tokenizer, messages, add_generation_prompt=True)
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
        # what is shown stands once in each text, and that of a chat template begins with the first message
        shown_before = template == CHAT and bool(messages)
        messages.append({"role": "user", "content": text if shown_before else picture + text})
        reply = answer([_fill(template, messages, tokenizer)])[0].strip()
        console.print(reply, markup=False, emoji=False, highlight=False, soft_wrap=True)
        messages.append({"role": "assistant", "content": reply})
