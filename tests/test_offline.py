"""merge and generate: an adapter and its merged model give the same texts, from a prompt, a file, or a chat."""

import io
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MakeBackbone, MakeTrainer, perturb_adapters
from transformers import AutoModelForCausalLM, AutoTokenizer

from datamodules.conversation import TokenizerTemplate
from dora_lightning import chat_templates
from dora_lightning.analyzing import command as analyzing
from dora_lightning.analyzing.command import analyze
from dora_lightning.mt_bench import commands as mt_bench_commands
from dora_lightning.mt_bench.answers import dialogue_prompt
from dora_lightning.mt_bench.commands import mt_bench
from dora_lightning.offline import commands, generate, merge, models

PROMPTS = ["is it cold or hot?", "what has many words, größe and 大小?", "Please choose the correct answer"]


@pytest.fixture
def adapter(make_backbone: MakeBackbone, make_trainer: MakeTrainer, tmp_path: Path) -> str:
    """A checkpoint of an adapter."""
    module = make_backbone()
    module.configure_model()
    perturb_adapters(module)
    trainer = make_trainer()
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "adapter.ckpt")
    return str(tmp_path / "adapter.ckpt")


@pytest.fixture
def merged(adapter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    merge(adapter, str(tmp_path / "merged"))
    assert f"Merged model: {tmp_path / 'merged'}" in capsys.readouterr().out
    return str(tmp_path / "merged")


def lines(text: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in text.splitlines()]


def test_one_prompt_by_the_chat_template(
    adapter: str, merged: str, capsys: pytest.CaptureFixture[str], tiny_llama: Path
) -> None:
    capsys.readouterr()
    outputs = []
    for model in (adapter, merged):
        generate(model, prompt=PROMPTS[0], max_new_tokens=12)
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    # by transformers alone
    tokenizer, network = AutoTokenizer.from_pretrained(merged), AutoModelForCausalLM.from_pretrained(merged)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPTS[0]}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = network.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert outputs[0].strip() == tokenizer.decode(written, skip_special_tokens=True).strip()
    generate(str(tiny_llama), prompt=PROMPTS[0], max_new_tokens=12)
    assert capsys.readouterr().out != outputs[0]


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_file_of_prompts(
    adapter: str, merged: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, batch_size: int
) -> None:
    path = tmp_path / f"prompts.{kind}"
    rows = [json.dumps({"prompt": prompt, "more": 1}) for prompt in PROMPTS] if kind == "jsonl" else PROMPTS
    path.write_text("\n\n".join(rows) + "\n", encoding="utf-8")
    capsys.readouterr()
    expected = []
    for prompt in PROMPTS:
        generate(adapter, prompt=prompt, template="none", max_new_tokens=6)
        expected.append(capsys.readouterr().out.strip())
    generate(merged, prompts=str(path), template="none", max_new_tokens=6, batch_size=batch_size)
    answers = lines(capsys.readouterr().out)
    assert [answer["prompt"] for answer in answers] == PROMPTS
    assert [answer["output"].strip() for answer in answers] == expected
    generate(adapter, prompts=str(path), template="none", max_new_tokens=6, output=str(tmp_path / "out.jsonl"))
    assert capsys.readouterr().out == ""
    assert lines((tmp_path / "out.jsonl").read_text(encoding="utf-8")) == answers


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_with_the_next_prompt(
    merged: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, output, kept = (
        tmp_path / "p.txt",
        tmp_path / "new" / "out.jsonl",
        tmp_path / "new" / "out.jsonl.unfinished",
    )
    prompts.write_text("\n".join([*PROMPTS, "hot", "cold"]))
    run: dict[str, Any] = {"prompts": str(prompts), "output": str(output), "max_new_tokens": 4, "batch_size": 2}
    generate(merged, **run)
    expected = output.read_text()
    output.write_text("of an earlier run")
    asked: list[str] = []
    generate_texts = models.generate_texts

    def note(model: Any, tokenizer: Any, texts: list[str], vision: Any, **options: Any) -> list[str]:
        if len(asked) == 2:
            raise Killed
        asked.extend(texts)
        return generate_texts(model, tokenizer, texts, vision, **options)

    monkeypatch.setattr(models, "generate_texts", note)
    with pytest.raises(Killed):
        generate(merged, **run)
    assert output.read_text() == "of an earlier run"
    assert len(lines(kept.read_text())) == 1 + 2
    with open(kept, "a") as file:
        file.write('{"prompt": "what')  # it was killed as it wrote
    monkeypatch.setattr(models, "load_model", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr(commands, "load_model", lambda *_: pytest.fail("the model was loaded"))
    for change, message in (
        ({"max_new_tokens": 5}, "max_new_tokens is 4 there, 5 here"),
        ({"template": "none"}, "template is None there, 'none' here"),
        ({"prompts": str(tmp_path / "other.txt")}, "prompts is "),
    ):
        (tmp_path / "other.txt").write_text("hot")
        with pytest.raises(ValueError, match=rf"unfinished holds 2 answers of another run \({message}.*remove"):
            generate(merged, **(run | change))
    monkeypatch.undo()
    monkeypatch.setattr(models, "generate_texts", note)
    asked[:] = [""]
    generate(merged, **run)
    assert len(asked) == 1 + 3
    assert output.read_text() == expected
    assert list(output.parent.iterdir()) == [output]


def test_a_model_that_changed_does_not_go_on(merged: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.txt").write_text("hot\ncold")
    run: dict[str, Any] = {"prompts": str(tmp_path / "p.txt"), "output": str(tmp_path / "o"), "batch_size": 1}
    replies = iter([["one"]])
    monkeypatch.setattr(models, "generate_texts", lambda *_, **__: next(replies))
    with pytest.raises((StopIteration, RuntimeError)):
        generate(merged, **run)
    weights = Path(merged) / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    with pytest.raises(ValueError, match=r"o\.unfinished holds 1 answers of another run \(files is"):
        generate(merged, **run)


@pytest.mark.parametrize("place", ["folder", "file/out.jsonl"])
def test_an_output_that_cannot_be_written_is_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def late(*_: Any, **__: Any) -> Any:
        raise AssertionError("the work has begun")

    (tmp_path / "folder" / "analysis.json").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "p.txt").write_text("hot")
    for module, name in ((commands, "load_model"), (mt_bench_commands, "load_language_model"), (analyzing, "collect")):
        monkeypatch.setattr(module, name, late)
    for name in ("read_judgments", "read_questions"):
        monkeypatch.setattr(mt_bench_commands, name, late if name == "read_judgments" else lambda _: [])
    refused = rf"{place.partition('/')[0]}.* (is a folder|cannot be written)"
    with pytest.raises(OSError, match=refused):
        generate("m", prompts=str(tmp_path / "p.txt"), output=str(tmp_path / place))
    with pytest.raises(OSError, match=refused):
        mt_bench_commands.mt_bench_scores("j", output=str(tmp_path / place))
    with pytest.raises(OSError, match=refused):
        analyze("m.ckpt", output=str(tmp_path / place))
    if place != "folder":
        with pytest.raises(OSError, match=refused):
            mt_bench("m", "q", output=str(tmp_path / place))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses a conversation: roles must alternate"),
        ("{{ messages[0]['content'] + none }}", "refuses a conversation: "),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", r"takes more than 0\.5 s"),
        ("{{ 'a' * 10 ** 7 ~ 'b' }}", "makes more than 10,000,000 characters"),
    ],
)
def test_a_chat_template_that_refuses_or_runs_wild_is_named(
    merged: str, tmp_path: Path, template: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_templates, "SECONDS", 0.5)
    (Path(merged) / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=rf"^the chat template of the tokenizer '{merged}' {reason}"):
        generate(merged, prompt="hot")
    tokenizer = AutoTokenizer.from_pretrained(merged)
    with pytest.raises(ValueError, match=reason):
        dialogue_prompt("chat", ["hot"], [], tokenizer)
    with pytest.raises(ValueError, match=reason):
        TokenizerTemplate(tokenizer).sample_text([("hot", None)])
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_template_of_ones_own(merged: str, capsys: pytest.CaptureFixture[str]) -> None:
    generate(merged, prompt="hot", template="Question: {prompt}?\nAnswer:", max_new_tokens=6)
    templated = capsys.readouterr().out
    generate(merged, prompt="Question: hot?\nAnswer:", template="none", max_new_tokens=6)
    assert capsys.readouterr().out == templated


def test_beams_and_sampling(merged: str, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for options in ({}, {"num_beams": 4}, {"temperature": 3.0}):
        torch.manual_seed(0)
        generate(merged, prompt="hot", max_new_tokens=12, **options)
        outputs.append(capsys.readouterr().out)
    assert len(set(outputs)) == 3


def test_a_chat_remembers(
    adapter: str, merged: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    generate_texts = models.generate_texts

    def note(model: Any, tokenizer: Any, prompts: list[str], vision: Any, **options: Any) -> list[str]:
        seen.extend(prompts)
        return generate_texts(model, tokenizer, prompts, vision, **options)

    monkeypatch.setattr(models, "generate_texts", note)
    capsys.readouterr()
    outputs = []
    for model in (adapter, merged):
        monkeypatch.setattr(sys, "stdin", io.StringIO("is it hot?\nis it cold?\n\nnever read\n"))
        generate(model, max_new_tokens=5)
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    first, second = seen[:2]
    assert first == "<s>user: is it hot?</s><s>assistant:"
    assert second.startswith("<s>user: is it hot?</s><s>assistant: ")
    assert second.endswith("</s><s>user: is it cold?</s><s>assistant:")
    assert seen[2:] == seen[:2]


def test_a_chat_ends_with_the_input(merged: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("is it hot?\n"))
    generate(merged, max_new_tokens=3)


def test_texts_that_look_like_markup_are_printed_as_they_are(
    monkeypatch: pytest.MonkeyPatch, merged: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "generate_texts", lambda *_, **__: ["[bold]an [/answer] :smile:"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    generate(merged)
    assert "[bold]an [/answer] :smile:" in capsys.readouterr().out


def test_merge_refuses_and_overwrites(adapter: str, merged: str) -> None:
    with pytest.raises(FileExistsError, match="exists; choose another folder or pass overwrite"):
        merge(adapter, merged)
    before = (Path(merged) / "model.safetensors").stat().st_ino
    merge(adapter, merged, overwrite=True)
    assert (Path(merged) / "model.safetensors").stat().st_ino != before
    (Path(merged) / "mine.txt").touch()
    with pytest.raises(FileExistsError, match=r"it holds mine\.txt, which dora-lightning did not write there"):
        merge(adapter, merged, overwrite=True)
    assert (Path(merged) / "mine.txt").exists()


def test_a_base_that_moved(adapter: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = torch.load(adapter, weights_only=True)
    content["dora_lightning"]["base"]["name"] = content["hyper_parameters"]["model_name_or_path"] = "./gone"
    torch.save(content, adapter)
    with pytest.raises(FileNotFoundError, match="no model folder at gone"):
        merge(adapter, str(tmp_path / "merged"))
    merge(adapter, str(tmp_path / "merged"), base=str(tiny_llama))
    capsys.readouterr()
    generate(adapter, prompt="hot", base=str(tiny_llama), max_new_tokens=5)
    expected = capsys.readouterr().out
    generate(str(tmp_path / "merged"), prompt="hot", max_new_tokens=5)
    assert capsys.readouterr().out == expected


# A checkpoint of a stranger -------------------------------------------------------------------------------------------


def change(checkpoint: str, base: object = None, **options: Any) -> None:
    """Write another base's name, or other hyperparameters, into a checkpoint."""
    content = torch.load(checkpoint, weights_only=True)
    if base is not None:
        content["dora_lightning"]["base"]["name"] = content["hyper_parameters"]["model_name_or_path"] = base
    content["hyper_parameters"] |= options
    torch.save(content, checkpoint)


@pytest.mark.parametrize(
    "base", ["package:x @ file:///tmp/x.whl", "package:--requirement=F", "package:a.b", "org/model"]
)
@pytest.mark.parametrize("verb", [generate, mt_bench, merge, analyze])
def test_the_base_that_a_checkpoint_names_is_never_fetched(
    adapter: str, tmp_path: Path, verb: Any, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **_: Any) -> Any:
        raise AssertionError(f"called with {args}")

    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    change(adapter, base)
    questions = tmp_path / "question.jsonl"
    questions.write_text('{"question_id": 1, "category": "writing", "turns": ["hot?"]}')
    given = {
        generate: {"prompt": "a"},
        mt_bench: {"questions": str(questions)},
        merge: {"output": str(tmp_path / "merged")},
        analyze: {"output": str(tmp_path)},
    }
    with pytest.raises(
        FileNotFoundError, match=r"adapter\.ckpt names '.*' as its base model, and no copy .* with --base$"
    ):
        verb(adapter, **given[verb])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attn_implementation", "evil/kernel"),
        ("attn_implementation", ["sdpa"]),
        ("dtype", "float8"),
        ("quantization", "evil"),
        ("adapter", "none"),
        ("adapter", {"rank": 4, "evil": 1}),
    ],
)
def test_a_checkpoint_has_no_say_in_what_is_run(adapter: str, name: str, value: object) -> None:
    change(adapter, None, **{name: value})
    with pytest.raises(ValueError, match=rf"adapter\.ckpt.*({name} is .*it may be|none of the backbones|unexpected)"):
        models.load_model(adapter, None)


@pytest.mark.parametrize("tensors", ["none", "some"])
def test_a_checkpoint_without_its_adapter_is_not_merged(adapter: str, tmp_path: Path, tensors: str) -> None:
    content = torch.load(adapter, weights_only=True)
    kept = {n: t for n, t in content["state_dict"].items() if tensors == "some" and "v_proj" not in n}
    torch.save(content | {"state_dict": kept}, adapter)
    with pytest.raises(ValueError, match=r"its state_dict is empty|no adapter of 'v_proj', which target_modules names"):
        merge(adapter, str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_what_a_checkpoint_says_beside_that_is_left_alone(adapter: str) -> None:
    expected = models.load_model(adapter, None).answer(["hot"], {}, max_new_tokens=6, do_sample=False)
    change(adapter, None, _instantiator="antigravity.fly", optimizer="evil", task="evil", feature_cache="/")
    assert models.load_model(adapter, None).answer(["hot"], {}, max_new_tokens=6, do_sample=False) == expected
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "a", "prompts": "b"}, "not both"),
        ({"prompt": "a", "template": "no place"}, r"template must be 'chat', 'none' or a text that contains {prompt}"),
        ({"prompt": "a", "base": "b"}, r"base belongs to an adapter checkpoint"),
        ({"prompts": "none.txt"}, r"no file of prompts at none\.txt"),
    ],
)
def test_bad_arguments(tiny_llama: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        generate(str(tiny_llama), **options)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt', r"line 2: broken JSON at column 2"),
        ("p.jsonl", '{"text": "a"}', r"(line|row) 1: expected a JSON object with text in the field"),
        ("p.jsonl", '["prompt"]', r"(line|row) 1: expected a JSON object with text in the field"),
        ("p.jsonl", '{"prompt": 3}', r"(line|row) 1: expected a JSON object with text in the field"),
    ],
)
def test_bad_files_of_prompts(tiny_llama: Path, tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        generate(str(tiny_llama), prompts=str(tmp_path / name))


def test_a_model_without_a_chat_template_says_what_to_do(untied_llama: Path) -> None:
    with pytest.raises(ValueError, match=r"has no chat template; choose --template none"):
        generate(str(untied_llama), prompt="hi")
