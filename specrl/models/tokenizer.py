"""A checkpoint's tokenizer and chat template, as `transformers` reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specrl.core.checks import require

Message = dict[str, Any]  # 'role', 'content' (text) and other keys that a chat template may read
# transformers passes today's date to templates. Without it they use a fixed date, so prompts are reproducible.
_NO_DATE = "{% set strftime_now = undefined %}\n"


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back.

    Args:
        hf: the tokenizer of `transformers`.
        bos_token_id: token at the start of a document; None: the checkpoint has none.
        bos_always: whether the checkpoint puts it before every prompt, not only at the start of a document.
    """

    hf: Any
    bos_token_id: int | None = None
    bos_always: bool = False

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint has a chat template."""
        return bool(self.hf.chat_template)

    def encode(self, text: str, *, document_start: bool = True) -> list[int]:
        """Return the token ids of `text`, after one bos token if the checkpoint uses it (see the class)."""
        ids, bos = self._ids(text, special=True), self.bos_token_id
        if bos is None:
            return ids
        if ids[:2] == [bos, bos]:  # one from the text, one from the tokenizer
            return ids[1:]
        return [bos, *ids] if (document_start or self.bos_always) and ids[:1] != [bos] else ids

    def encode_chat(self, text: str) -> list[int]:
        """Return the token ids of a text from `render_chat`, which contains its special tokens."""
        return self._ids(text, special=False)

    def render_chat(self, messages: Sequence[Message], tools: Any = None) -> str:
        """Format a conversation by the chat template, with the beginning of the assistant's answer.

        Raises:
            ValueError: the template is invalid or raises an error for these messages.
        """
        try:
            template = _NO_DATE + self.hf.get_chat_template(tools=tools)
            options = {"tools": tools, "chat_template": template, "tokenize": False, "add_generation_prompt": True}
            return str(self.hf.apply_chat_template(list(messages), **options))
        except Exception as error:  # a template can fail in any way
            raise ValueError(f"the target's chat template refuses it ({' '.join(str(error).split())})") from error

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return str(self.hf.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _ids(self, text: str, special: bool) -> list[int]:
        options = {"truncation": False, "padding": False, "verbose": False}
        ids: list[int] = self.hf.encode(text, add_special_tokens=special, **options)
        return ids


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Read the tokenizer of a checkpoint directory, with its chat template if it has one.

    Raises:
        ValueError: there is none that can be read, or it has tokens that the model of config.json does not have.
    """
    from transformers import AutoTokenizer, PreTrainedConfig
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    path = str(directory)
    require(Path(directory).is_dir(), "a checkpoint", "a directory", path)
    try:
        hf = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        config, _ = PreTrainedConfig.get_config_dict(path, local_files_only=True)
    except Exception as error:  # the type depends on the files
        rule = f"a checkpoint must hold a tokenizer that transformers can read, but {path!r} does not"
        remedy = "download it again or add tokenizer.json; tokenizer.model needs the package sentencepiece"
        raise ValueError(f"{rule} ({' '.join(str(error).split())}); {remedy}") from error
    adds = get_tokenizer_config(path, local_files_only=True).get("add_bos_token")  # transformers ignores it
    bos = None if adds is False else hf.bos_token_id
    tokens, limit = max(hf.vocab_size, -1 if bos is None else bos + 1), config.get("vocab_size")
    fits = not isinstance(limit, int) or tokens <= limit
    require(fits, f"the tokenizer in {path!r}", f"the model's, of at most vocab_size={limit} tokens", tokens)
    adds_itself = hf.encode("", add_special_tokens=True)[:1] == [bos]
    return Tokenizer(hf, bos, bos_always=adds_itself or bool(adds))
