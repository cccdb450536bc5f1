"""Settings that commands and studies share: frozen dataclasses that raise a ValueError if a value is out of range.

The command line makes an option of every field: `TargetConfig.dtype` of a parameter `target` is `--target.dtype`, and
`--target NAME` is short for the first field, `--target.name NAME`. The lines under `Args:` are the help texts.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from specrl.core.checks import require
from specrl.core.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from specrl.core.interfaces import Engine, Workload
    from specrl.models.draft import Draft
    from specrl.models.target import Target
    from specrl.workloads.text import Split

DTypeName = Literal["float32", "bfloat16"]
SMALL_TARGET = 512  # hidden size below which a new draft gets a narrow MLP
NARROW_MLP = 256  # intermediate size of that MLP


@dataclass(frozen=True)
class TargetConfig:
    """The target model.

    Args:
        name: directory, Hugging Face id, or 'embedded', 'embedded-easy' or '-strong'.
        dtype: of its weights. Greedy output is exactly lossless in float32.
        device: 'cpu' or a CUDA device; by default a GPU if there is one.
    """

    name: str = "embedded"
    dtype: DTypeName = "float32"
    device: str | None = None

    def __post_init__(self) -> None:
        require(self.dtype in ("float32", "bfloat16"), "target.dtype", "'float32' or 'bfloat16'", self.dtype)

    def load(self, *, device: str | None = None) -> Target:
        """Load the model; `device` replaces a `self.device` of None (see `specrl.load_target` for errors)."""
        from specrl.models.target import default_device, load_target

        return load_target(self.name, device=default_device(self.device or device), dtype=self.dtype)


@dataclass(frozen=True)
class DraftConfig:
    """The draft model: an EAGLE3 checkpoint, or a new one from random initialisation.

    Args:
        path: EAGLE3 draft directory; by default a new draft, randomly initialised.
        vocab_size: most frequent tokens that a new draft can predict; by default all tokens.
        intermediate_size: width of a new draft's MLP; by default the target's. For a target with a hidden size below
            512 it is at most 256 by default.
    """

    path: Path | None = None
    vocab_size: int | None = None
    intermediate_size: int | None = None

    def __post_init__(self) -> None:
        for name, size in {"vocab_size": self.vocab_size, "intermediate_size": self.intermediate_size}.items():
            require(size is None or size >= 1, f"draft.{name}", "at least 1", size)
            require(size is None or self.path is None, f"draft.{name}", "left out if draft.path is set", size)

    def load(self, target: Target, *, seed: int = 0, vocabulary: Tensor | None = None) -> Draft:
        """Load the checkpoint at `path`, or make a new draft.

        Args:
            target: the model that it drafts for.
            seed: of a new draft's initialisation.
            vocabulary: [vocab_size] int64, ascending target ids that a new draft can predict; None: all. Count them
                by `specrl.training.vocabulary`.

        Raises:
            ValueError: a checkpoint that cannot be read, or no vocabulary of `vocab_size` tokens.
        """
        from specrl.models.draft import load_draft, new_draft

        if self.path is not None:
            return load_draft(self.path)
        counted = None if vocabulary is None else len(vocabulary)
        require(
            self.vocab_size in (None, counted), "draft.vocab_size", f"the vocabulary's size, {counted}", self.vocab_size
        )
        width = self.intermediate_size
        if width is None and target.config.hidden_size < SMALL_TARGET:
            width = min(NARROW_MLP, target.config.intermediate_size)
        return new_draft(target, intermediate_size=width, vocabulary=vocabulary, seed=seed)


@dataclass(frozen=True)
class WorkloadConfig:
    """The requests.

    Args:
        name: 'stdlib', file, directory, or a stream 'stdlib@500,own.jsonl'. See docs/guides/model.md.
        prompt_tokens: tokens of a prompt. A conversation is never cut, but left out if it is longer.
        max_new_tokens: tokens generated per request.
        temperature: of sampling; 0 is greedy.
    """

    name: str = "stdlib"
    prompt_tokens: int = 64
    max_new_tokens: int = 128
    temperature: float = 0.7

    def __post_init__(self) -> None:
        require(self.prompt_tokens >= 1, "workload.prompt_tokens", "at least 1", self.prompt_tokens)
        require(self.max_new_tokens >= 1, "workload.max_new_tokens", "at least 1", self.max_new_tokens)
        finite = 0 <= self.temperature < math.inf
        require(finite, "workload.temperature", "a finite number of at least 0", self.temperature)

    @property
    def max_context(self) -> int:
        """Maximum number of tokens of a request, prompt included."""
        return self.prompt_tokens + self.max_new_tokens

    def open(self, target: str, split: Split, *, ignore_eos: bool | None = None) -> Workload:
        """Return the requests in the tokens of a target.

        Args:
            target: name of the target (`TargetConfig.name`).
            split: 'train', 'held_out' or 'all'; a file or directory is always used as a whole.
            ignore_eos: generate `max_new_tokens` whatever the model says; None: for 'held_out' only, so that
                measured requests have equal lengths.

        Raises:
            ValueError: no such workload, or no prompt of this length in it.
        """
        from specrl.workloads.stream import open_stream

        return open_stream(
            self.name,
            target,
            split=split,
            prompt_tokens=self.prompt_tokens,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            ignore_eos=split == "held_out" if ignore_eos is None else ignore_eos,
        )


@dataclass(frozen=True)
class EngineConfig:
    """The engine that decodes.

    Args:
        name: 'local' (this process) or 'sglang'. Two SGLang servers are launched, with and without speculation.
        python: for 'sglang': Python with SGLang and this package; by default this one.
        flags: for 'sglang': further flags for sglang.launch_server.
    """

    name: Literal["local", "sglang"] = "local"
    python: Path | None = None
    flags: str = ""

    def __post_init__(self) -> None:
        require(self.name in ("local", "sglang"), "engine.name", "'local' or 'sglang'", self.name)
        for name, value in {"python": self.python, "flags": self.flags}.items():
            require(not value or not self.is_local, f"engine.{name}", "left out without --engine sglang", str(value))

    @property
    def is_local(self) -> bool:
        """Whether it decodes in this process."""
        return self.name == "local"

    @property
    def flag_words(self) -> tuple[str, ...]:
        """The flags, split as a shell would."""
        return tuple(shlex.split(self.flags))

    def options(self) -> dict[str, Any]:
        """Keyword arguments that `specrl.core.registry.make_engine` takes for this engine by its name."""
        return {} if self.is_local else {"python": self.python, "flags": self.flag_words}

    def open(
        self,
        target: TargetConfig,
        draft: Draft | Path | None,
        *,
        plans: Sequence[Plan],
        max_context: int,
        model: Target | None = None,
        use_rejection_sampling: bool = True,
        trace: bool = False,
        plain_in_lockstep: bool = False,
    ) -> Engine:
        """Make the engine; close it after use.

        Args:
            target: the target model.
            draft: a draft or its directory; None: 'local' decodes plainly, 'sglang' gets a random draft.
            plans: that it must be able to run.
            max_context: maximum tokens of a request, for 'local'.
            model: the loaded target, for 'local'; None: it is loaded here.
            use_rejection_sampling: see `specrl.LocalEngine`.
            trace: for 'sglang': record traces; a local session is asked for them when it starts.
            plain_in_lockstep: for 'sglang': the server without speculation runs one round at a time too, as
                measurements of whole plain sessions need.

        Raises:
            ValueError: plans or a draft that the engine cannot run, or an environment without SGLang.
        """
        if self.is_local:
            from specrl.decoding.engine import LocalEngine
            from specrl.models.draft import load_draft

            loaded = load_draft(draft) if isinstance(draft, Path) else draft
            return LocalEngine(
                target.load() if model is None else model,
                loaded,
                max_context=max_context,
                use_rejection_sampling=use_rejection_sampling,
            )
        from specrl.core.registry import make_engine

        arguments: dict[str, Any] = {"target": target.name, "draft": draft, "plans": tuple(plans), "trace": trace}
        if plain_in_lockstep:
            arguments["plain_flags"] = ("--disable-overlap-schedule",)
        return make_engine(self.name, **arguments, **self.options())


@dataclass(frozen=True)
class MeasureConfig:
    """How long to measure.

    Args:
        precision: measure until each 95 % interval has a half-width of at most this.
        seconds: or until this much time is spent per batch size.
    """

    precision: float = 0.02
    seconds: float = 60.0

    def __post_init__(self) -> None:
        require(0 < self.precision < 1, "measure.precision", "in (0, 1)", self.precision)
        require(0 < self.seconds < math.inf, "measure.seconds", "a finite number above 0", self.seconds)


def check_batch_sizes(batch_sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the batch sizes; raise a ValueError if there are none or one is below 1."""
    positive = bool(batch_sizes) and min(batch_sizes) >= 1
    require(positive, "batch_sizes", "numbers of at least 1, such as 1,4,16", list(batch_sizes))
    return tuple(batch_sizes)
