"""From conversations to prompts, by the chat template that came with the model's tokenizer.

chat = Chat(tokenizer)                                     # raises DataError where the tokenizer has no template
prompt = chat.prompt([{"role": "user", "content": "Hello"}])
"""

from __future__ import annotations

from typing import Any

from dsgpt.data.chat_formats import read_question
from dsgpt.data.chat_template import DEFAULT, ChatTemplate, Unusable
from dsgpt.errors import DataError
from dsgpt.generate.text import Prompt
from dsgpt.tokenizer.tokenizer import Tokenizer


class Chat:
    """Conversations with one model. `template` is Jinja text instead of the tokenizer's, or "chatml" for the shipped one."""

    def __init__(self, tokenizer: Tokenizer, template: str | None = None):
        if template is None and tokenizer.chat_template is None:
            raise DataError(
                "the model's tokenizer has no chat template, so it was probably not trained on chats",
                do="continue plain text (dsgpt generate, /v1/completions), or give --chat-template FILE | chatml",
            )
        self._template = ChatTemplate(tokenizer, DEFAULT if template == "chatml" else template)
        try:
            ids, self._stop = self._template.turn_end()
        except Unusable:  # it wants conversations of another kind; the end token is left
            ids, self._stop = [], ()
        self._end_ids = tuple(dict.fromkeys([*ids, *tokenizer.end_ids]))

    def prompt(self, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> Prompt:
        """Of messages in OpenAI's form, of which the last waits for an answer. Raises DataError for others."""
        messages, tools = read_question({"messages": messages, "tools": tools})
        try:
            return Prompt(self._template.prompt(messages, tools), self._end_ids, self._stop)
        except Unusable as error:
            raise DataError("the conversation cannot be written for the model", seen=str(error)) from error

    def answered(self, messages: list[dict[str, Any]], answer: str) -> list[int]:
        """Ids of the conversation with an answer, up to the end of its turn: what training has taught."""
        told = [{"train": False, **message} for message in messages]
        ids = self._template.encode([*told, {"role": "assistant", "content": answer, "train": True}], []).ids.tolist()
        begin = len(self.prompt(messages).ids)
        ends = [place for place, token in enumerate(ids) if place >= begin and token in self._end_ids]
        return ids[: ends[0] + 1] if ends else ids

    def num_tokens(self, messages: list[dict[str, Any]]) -> int:
        """Of a whole conversation, as it is trained on."""
        told = [{"train": message["role"] == "assistant", **message} for message in messages]
        return len(self._template.encode(told, []).ids)
