"""A checkpoint's tokenizer: text to token ids and back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from specrl.models.chat import ChatTemplate, read_chat_template


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back, with the checkpoint's habit of beginning.

    Args:
        encoder: of the `tokenizers` library.
        bos: the token that begins a document; None: the checkpoint names none.
        bos_always: it begins every prompt, not only a prompt at the start of a document.
        chat: the chat template; None: the checkpoint has none.
    """

    encoder: tokenizers.Tokenizer
    bos: int | None = None
    bos_always: bool = False
    chat: ChatTemplate | None = None

    def encode(self, text: str, *, document_start: bool = True) -> list[int]:
        """Token ids of `text`, with the bos token before it, once, where the checkpoint puts one."""
        ids: list[int] = self.encoder.encode(text).ids
        if self.bos is None or ids[:2] == [self.bos, self.bos]:  # added by the encoder to a text that has it already
            return ids if self.bos is None else ids[1:]
        wanted = document_start or self.bos_always
        return [self.bos, *ids] if wanted and ids[:1] != [self.bos] else ids

    def encode_chat(self, text: str) -> list[int]:
        """Token ids of what `chat` rendered, which holds every special token that it wants."""
        ids: list[int] = self.encoder.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return str(self.encoder.decode(list(ids)))


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Read tokenizer.json, and tokenizer_config.json where there is one, of a checkpoint directory.

    Raises:
        ValueError: there is no tokenizer.json, it cannot be read, or the bos token is not in its vocabulary.
    """
    path = Path(directory, "tokenizer.json")
    if not path.is_file():
        raise ValueError(
            f"a checkpoint must hold tokenizer.json, but {directory} has none; save it with the fast tokenizer"
        )
    try:
        encoder = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"tokenizer.json must be readable by tokenizers {tokenizers.__version__}, but {path}: {error}"
        ) from error
    encoder.no_truncation()
    encoder.no_padding()
    beside = path.with_name("tokenizer_config.json")
    config = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    chat = read_chat_template(path.parent, config)
    name = config.get("bos_token")
    name = name.get("content") if isinstance(name, dict) else name
    if name is None or config.get("add_bos_token") is False:
        return Tokenizer(encoder, chat=chat)
    bos = encoder.token_to_id(name)
    if bos is None:
        raise ValueError(
            f"the bos token must be in the vocabulary, but {beside} names {name!r}, which {path.name} lacks"
        )
    adds_by_itself = encoder.num_special_tokens_to_add(False) > 0
    return Tokenizer(encoder, bos, bos_always=adds_by_itself or bool(config.get("add_bos_token")), chat=chat)
