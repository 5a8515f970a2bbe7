"""Prompt templates: how an instruction becomes the text that a model reads."""

import difflib
from dataclasses import dataclass

_BELOW = "Below is an instruction that describes a task"
_WITH_INPUT = f"{_BELOW}, paired with an input that provides further context"
_WRITE = "Write a response that appropriately completes the request."
# the published prompts of LLM-Adapters are indented Python literals, and the indentation is part of the text
_INDENT = " " * 16


@dataclass(frozen=True)
class PromptTemplate:
    """The texts around an instruction, as format strings with ``{instruction}`` and ``{input}``.

    Training and evaluation are apart because the published protocol of LLM-Adapters has two different prompts.
    """

    train: str
    """Prompt to train on; the target follows."""
    train_with_input: str
    """The same for a row that also has an input."""
    eval: str
    """Prompt to generate from."""
    eval_with_input: str
    """The same for a row that also has an input."""
    target_prefix: str = ""
    """What stands between the prompt and the text of the answer: a space where the prompt ends in a word."""

    def train_prompt(self, instruction: str, input: str = "") -> str:
        """The prompt to train on.

        >>> get_template("plain").train_prompt("Is water wet?")
        'Question: Is water wet?\\nAnswer:'
        """
        template = self.train_with_input if input else self.train
        return template.format(instruction=instruction, input=input)

    def eval_prompt(self, instruction: str, input: str = "") -> str:
        """The prompt to generate from."""
        template = self.eval_with_input if input else self.eval
        return template.format(instruction=instruction, input=input)


_ALPACA = f"{_BELOW}. {_WRITE}\n\n### Instruction:\n{{instruction}}\n\n### Response:\n"
_ALPACA_WITH_INPUT = (
    f"{_WITH_INPUT}. {_WRITE}\n\n### Instruction:\n{{instruction}}\n\n### Input:\n{{input}}\n\n### Response:\n"
)
_PLAIN = "Question: {instruction}\nAnswer:"
_PLAIN_WITH_INPUT = "Question: {instruction}\n{input}\nAnswer:"

TEMPLATES: dict[str, PromptTemplate] = {
    # yahma/alpaca-cleaned as alpaca-lora prompts it
    "alpaca": PromptTemplate(_ALPACA, _ALPACA_WITH_INPUT, _ALPACA, _ALPACA_WITH_INPUT),
    # LLM-Adapters and DoRA, finetune.py (train) and commonsense_evaluate.py (eval), byte for byte: between an
    # instruction and the next heading stands a line of 16 spaces in training and an empty one in evaluation,
    # and the number of spaces after "request." is 2, 1, 1 and 0
    "llm_adapters": PromptTemplate(
        train=(
            f"{_BELOW}. {_WRITE}  \n\n{_INDENT}### Instruction:\n{_INDENT}{{instruction}}\n{_INDENT}\n"
            f"{_INDENT}### Response:\n{_INDENT}"
        ),
        train_with_input=(
            f"{_WITH_INPUT}. {_WRITE} \n\n{_INDENT}### Instruction:\n{_INDENT}{{instruction}}\n{_INDENT}\n"
            f"{_INDENT}### Input:\n{_INDENT}{{input}}\n{_INDENT}\n{_INDENT}### Response:\n{_INDENT}"
        ),
        eval=(
            f"{_BELOW}. {_WRITE} \n\n{_INDENT}### Instruction:\n{_INDENT}{{instruction}}\n\n"
            f"{_INDENT}### Response:\n{_INDENT}"
        ),
        eval_with_input=(
            f"{_WITH_INPUT}. {_WRITE}\n\n{_INDENT}### Instruction:\n{_INDENT}{{instruction}}\n\n"
            f"{_INDENT}### Input:\n{_INDENT}{{input}}\n\n{_INDENT}### Response:\n{_INDENT}"
        ),
    ),
    # the layout of lm-evaluation-harness, for ranking options by log-likelihood
    "plain": PromptTemplate(_PLAIN, _PLAIN_WITH_INPUT, _PLAIN, _PLAIN_WITH_INPUT, target_prefix=" "),
}
"""The templates by name."""


def get_template(name: str) -> PromptTemplate:
    """The template called ``name``.

    Raises:
        ValueError: There is no such template; the message lists the names.
    """
    if name not in TEMPLATES:
        close = difflib.get_close_matches(name, TEMPLATES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown template {name!r}.{hint} The templates are: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
