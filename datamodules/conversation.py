"""Conversation templates: how several turns of question and answer become one text, and which of it are answers."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from transformers import PreTrainedTokenizerBase

from dora_lightning.chat_templates import apply_chat_template

Turns: TypeAlias = Sequence[tuple[str, str | None]]
"""Pairs of question and answer in their order; the last answer is None where it is to be generated."""

TOKENIZER = "tokenizer"
"""Name of the template that comes with the tokenizer."""


class Rendered(NamedTuple):
    """A conversation as one text, ``prompt + target``; the fields are those of :class:`~dora_lightning.data.Sample`."""

    prompt: str
    """Everything before the last answer."""

    target: str
    """The last answer with what ends it; empty if it is None."""

    answered: tuple[tuple[int, int], ...]
    """Where in the prompt the earlier answers stand, with what ends each: characters ``[start, end)``."""


@dataclass(frozen=True)
class ConversationTemplate:
    """The texts around questions and answers.

    An answer that is trained on begins right after ``before_answer`` and ends with ``end``.
    """

    opening: str
    """The system message and what stands around it."""
    before_question: str
    before_answer: str
    """Between a question and its answer; a prompt to generate from ends in it."""
    answer_prefix: str
    """Between ``before_answer`` and the answer; the model writes it too."""
    end: str
    """Token that ends an answer."""
    between: str = ""
    """Between an answer's end and the next question."""
    tokens: tuple[str, ...] = ()
    """Texts above that must each be one token; else generation would never stop, or read letters in their place."""
    system: str = ""
    """The part of ``opening`` that a conversation's own system message takes the place of."""

    def sample_text(self, turns: Turns, system: str | None = None) -> Rendered:
        """The conversation as text.

        Args:
            turns: Questions and answers.
            system: The conversation's own system message; the template's if None.

        Raises:
            ValueError: There are no turns, or an answer other than the last is missing.

        Example::

            >>> text = get_conversation_template("vicuna_v1").sample_text([("Who?", "Me."), ("Why?", "Because.")])
            >>> text.prompt[-50:], text.target
            ('USER: Who? ASSISTANT: Me.</s>USER: Why? ASSISTANT:', ' Because.</s>')
            >>> [text.prompt[start:end] for start, end in text.answered]
            [' Me.</s>']
        """
        _check_turns(turns)
        prompt = self.opening if system is None else self.opening.replace(self.system, system)
        answered = []
        for question, answer in turns[:-1]:
            prompt += self.before_question + question + self.before_answer
            start = len(prompt)
            prompt += self._answer(answer)
            answered.append((start, len(prompt)))
            prompt += self.between
        question, answer = turns[-1]
        prompt += self.before_question + question + self.before_answer
        return Rendered(prompt, self._answer(answer), tuple(answered))

    def _answer(self, answer: str | None) -> str:
        return "" if answer is None else self.answer_prefix + answer + self.end


class TokenizerTemplate:
    """The chat template that comes with a tokenizer.

    Args:
        tokenizer: The tokenizer; its template makes the whole text, special tokens at the beginning included.

    Raises:
        ValueError: The tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} has no chat template of its own; "
                f"choose another template: {', '.join(CONVERSATION_TEMPLATES)}"
            )
        self.tokenizer = tokenizer
        self._wants_parts = False
        self._wants_parts = not self._writes_text()

    def sample_text(self, turns: Turns, system: str | None = None) -> Rendered:
        """The conversation as text; see :meth:`ConversationTemplate.sample_text`.

        Raises:
            ValueError: As there, or the template refuses the conversation or writes earlier turns in another way once
            later ones follow.
        """
        _check_turns(turns)
        messages: list[dict[str, object]] = [] if system is None else [self._message("system", system)]
        spans: list[tuple[int, int]] = []
        text = ""
        for question, answer in turns:
            messages.append(self._message("user", question))
            prompt = self._render(messages, add_generation_prompt=True)
            if not prompt.startswith(text):
                raise ValueError(_CHANGES_EARLIER_TURNS)
            if answer is None:
                return Rendered(prompt, "", tuple(spans))
            messages.append(self._message("assistant", answer))
            # white space after the token that ends an answer belongs to the layout
            text = self._render(messages).rstrip()
            if not text.startswith(prompt):
                raise ValueError(_CHANGES_EARLIER_TURNS)
            spans.append((len(prompt), len(text)))
        start, _ = spans.pop()
        return Rendered(text[:start], text[start:], tuple(spans))

    def _writes_text(self) -> bool:
        """Whether the template takes plain text: some want a list of parts, and leave text out or stumble over it."""
        try:
            return "probe" in self._render([self._message("user", "probe")])
        except ValueError:
            return False

    def _message(self, role: str, text: str) -> dict[str, object]:
        return {"role": role, "content": [{"type": "text", "text": text}] if self._wants_parts else text}

    def _render(self, messages: list[dict[str, object]], add_generation_prompt: bool = False) -> str:
        return apply_chat_template(self.tokenizer, messages, add_generation_prompt)


def prompt_form(template: ConversationTemplate | TokenizerTemplate) -> str:
    """What is around one question, ``{prompt}``, up to where its answer begins."""
    return template.sample_text([("{prompt}", None)]).prompt


_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_LLAMA3_SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_CHATML_SYSTEM = "You are a helpful assistant."

CONVERSATION_TEMPLATES: dict[str, ConversationTemplate] = {
    # LLaVA-1.5; the space before an answer is part of its first token in LLaMA's vocabulary, so it is written too
    "vicuna_v1": ConversationTemplate(
        opening=f"{_VICUNA_SYSTEM} ",
        system=_VICUNA_SYSTEM,
        before_question="USER: ",
        before_answer=" ASSISTANT:",
        answer_prefix=" ",
        end="</s>",
        tokens=("</s>",),
    ),
    # LLaVA-NeXT on LLaMA-3
    "llama3": ConversationTemplate(
        opening=f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{_LLAMA3_SYSTEM}<|eot_id|>",
        system=_LLAMA3_SYSTEM,
        before_question="<|start_header_id|>user<|end_header_id|>\n\n",
        before_answer="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        answer_prefix="",
        end="<|eot_id|>",
        tokens=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    # as Qwen, SmolLM2 and LLaVA-OneVision write it, a line feed after each <|im_end|>
    "chatml": ConversationTemplate(
        opening=f"<|im_start|>system\n{_CHATML_SYSTEM}<|im_end|>\n",
        system=_CHATML_SYSTEM,
        before_question="<|im_start|>user\n",
        before_answer="<|im_end|>\n<|im_start|>assistant\n",
        answer_prefix="",
        end="<|im_end|>",
        between="\n",
        tokens=("<|im_start|>", "<|im_end|>"),
    ),
}
"""The templates by name; ``tokenizer`` beside them is the tokenizer's own."""

_CHANGES_EARLIER_TURNS = (
    "the tokenizer's chat template writes earlier turns in another way once later ones follow, so the answers cannot "
    f"be told from the rest; choose another template: {', '.join(CONVERSATION_TEMPLATES)}"
)


def get_conversation_template(
    name: str, tokenizer: PreTrainedTokenizerBase | None = None
) -> ConversationTemplate | TokenizerTemplate:
    """The conversation template called ``name``.

    Args:
        name: ``vicuna_v1``, ``llama3``, ``chatml``, or ``tokenizer`` for the tokenizer's own chat template.
        tokenizer: What the text is for; the template ``tokenizer`` needs it, the others are checked against it.

    Raises:
        ValueError: There is no such template, or it does not fit the tokenizer.
    """
    if name == TOKENIZER:
        if tokenizer is None:
            raise ValueError("the template 'tokenizer' needs the tokenizer")
        return TokenizerTemplate(tokenizer)
    check_conversation_template(name)
    template = CONVERSATION_TEMPLATES[name]
    if tokenizer is not None:
        vocabulary = tokenizer.get_vocab()
        if missing := [token for token in template.tokens if token not in vocabulary]:
            raise ValueError(
                f"template {name!r} does not fit the tokenizer {tokenizer.name_or_path!r}, which has no token "
                f"{', '.join(map(repr, missing))}; choose another: {', '.join([*CONVERSATION_TEMPLATES, TOKENIZER])}"
            )
    return template


def check_conversation_template(name: str) -> None:
    """See whether there is a template called ``name``, before a tokenizer is at hand.

    Raises:
        ValueError: There is none; the message lists the names.
    """
    known = [*CONVERSATION_TEMPLATES, TOKENIZER]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown conversation template {name!r}.{hint} The templates are: {', '.join(known)}")


def _check_turns(turns: Turns) -> None:
    if not turns:
        raise ValueError("a conversation needs at least one turn")
    if any(answer is None for _, answer in turns[:-1]):
        raise ValueError("only the last answer of a conversation can be left out")
