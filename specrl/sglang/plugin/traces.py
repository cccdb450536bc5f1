"""Traces of SGLang's rounds: what a learner needs of every verified token, accepted or not, as frames for the ring.

A 'round' frame holds, for the B requests of a verification that are traced: tokens [B, n] int64 (row 0 the last
committed one), children [B, n] and siblings [B, n] int64 (the tree's links, -1: none), logits [B, n, V] (the target's,
after penalties), features [B, n, 3H] (the fused taps), path [B, num_steps + 1] int64 (accepted rows, -1 padded) and
positions [B] int64 (of row 0). A 'prefill' frame: tokens [T] and features [T, 3H] of one request, from `start` on. A
'finished' frame: requests that have ended. `requests` are SGLang's ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from specrl.core.clock import Clock, WallClock
from specrl.sglang.plugin.failsafe import Failsafe, log
from specrl.sglang.plugin.ring import Ring
from specrl.sglang.plugin.settings import Settings
from specrl.sglang.plugin.wire import Frame

OPT_OUT = "specrl_traces"  # {"custom_params": {"specrl_traces": false}} in a request's sampling parameters


class Copied:
    """Tensors on their way to host memory; serving does not wait for them."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors, self._done = {}, None
        for name, tensor in tensors.items():
            if tensor.is_cuda:
                self._tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                self._tensors[name].copy_(tensor, non_blocking=True)
            else:
                self._tensors[name] = tensor.clone()
        if any(tensor.is_cuda for tensor in tensors.values()):
            self._done = torch.cuda.Event()
            self._done.record()

    def ready(self) -> dict[str, Tensor]:
        """They, once they have arrived; for another thread than the one that serves."""
        if self._done is not None:
            self._done.synchronize()
        return self._tensors


class Tracer:
    """Makes frames of what SGLang's hooks see.

    Args:
        settings: with a socket for traces.
        safe: of this part.
        clock: that times rounds, on the host alone.
        version: gives SGLang's name for the weights that serve, which hot swaps of a draft set; '': not known.
    """

    def __init__(self, settings: Settings, safe: Failsafe, clock: Clock, version: Callable[[], str] = str) -> None:
        assert settings.traces is not None
        self._rate, self._clock, self._version = settings.rate, clock, version
        self._live: dict[str, Any] = {}  # request id -> SGLang's request
        self._last = 0.0
        self.ring = Ring(settings.traces, settings.ring, self._ended, safe)
        log.warning("specrl plugin: traces are handed out on %s", settings.traces)

    def prefill(self, batch: Any, features: Tensor | None) -> None:
        """Requests whose prompt, or a part of it, the target has read."""
        if not self.ring.wanted or features is None or batch.forward_mode.is_idle():
            return
        first, tokens = 0, batch.input_ids
        for request, count, start in zip(batch.reqs, batch.extend_lens, batch.prefix_lens, strict=True):
            rows, first = slice(first, first + count), first + count
            if self._traced(request) and self.ring.room():
                self._live[request.rid] = request
                said = {"kind": "prefill", "requests": [request.rid], "start": int(start)}
                self._put(said, {"tokens": tokens[rows].long(), "features": features[rows]})

    def round(self, verified: Any, batch: Any, output: Any, result: Sequence[Tensor]) -> None:
        """A verified round."""
        now, before = self._clock.now(), self._last
        self._last = now
        if not self.ring.wanted or batch.forward_mode.is_idle() or output.hidden_states is None:
            return
        chosen = [index for index, request in enumerate(batch.reqs) if self._traced(request)]
        if not chosen or not self.ring.room():
            return
        self._live.update((batch.reqs[index].rid, batch.reqs[index]) for index in chosen)
        count, n = len(batch.reqs), int(verified.draft_token_num)
        some = torch.tensor(chosen, device=output.next_token_logits.device)

        def rows(tensor: Tensor) -> Tensor:
            return tensor.view(count, n, -1).index_select(0, some)

        accepted = result[2].view(count, -1).long()
        base = torch.arange(count, device=accepted.device)[:, None] * n
        path = torch.where(accepted >= 0, accepted - base, accepted)
        tensors = {
            "tokens": rows(verified.draft_token).squeeze(-1).long(),
            "logits": rows(output.next_token_logits[: count * n]),
            "features": rows(output.hidden_states[: count * n]),
            "path": path.index_select(0, some),
            "positions": batch.seq_lens.index_select(0, some).long(),
        }
        if verified.topk > 1:
            tensors["children"] = rows(verified.retrieve_next_token).squeeze(-1).long()
            tensors["siblings"] = rows(verified.retrieve_next_sibling).squeeze(-1).long()
        temperatures = [float(batch.reqs[index].sampling_params.temperature) for index in chosen]
        greedy = [batch.reqs[index].sampling_params.top_k == 1 for index in chosen]
        said = {
            "kind": "round",
            "requests": [batch.reqs[index].rid for index in chosen],
            "plan": f"{verified.spec_steps}/{verified.topk}/{n}" if verified.spec_steps else "0",
            "temperatures": [0.0 if g else t for g, t in zip(greedy, temperatures, strict=True)],
            "batch_size": count,
            "weight_version": self._version(),
            "seconds": now - before if before else None,  # since the verification before, on the host
        }
        self._put(said, tensors)

    def _put(self, said: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        copied = Copied(tensors)
        self.ring.put(lambda: Frame(said, copied.ready()))

    def _traced(self, request: Any) -> bool:
        """Whether a request takes part: all of it does, or none."""
        custom = request.sampling_params.custom_params
        if isinstance(custom, dict) and custom.get(OPT_OUT) is False:
            return False
        digest = hashlib.blake2b(str(request.rid).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") < self._rate * 2.0**64

    def _ended(self) -> list[Frame]:
        done = [rid for rid, request in list(self._live.items()) if request.finished()]
        for rid in done:
            self._live.pop(rid, None)
        return [Frame({"kind": "finished", "requests": done}, {})] if done else []


class Hooks:
    """The functions that SGLang calls; the tracer is made at the first of them, in the process that serves.

    Args:
        settings: with a socket for traces.
        rank: gives the rank of tensor parallelism; only rank 0 hands traces out.
        version: gives SGLang's name for the weights that serve; '': not known.
    """

    def __init__(self, settings: Settings, rank: Callable[[], int], version: Callable[[], str] = str) -> None:
        self.safe = Failsafe("tracing", "SGLang serves without it")
        self._settings, self._rank, self._version = settings, rank, version
        self._tracer: Tracer | None = None
        self._asked = False

    @property
    def tracer(self) -> Tracer | None:
        """The tracer; None on other ranks."""
        if not self._asked:
            self._asked = True
            if self._rank() == 0:
                self._tracer = Tracer(self._settings, self.safe, WallClock(), self._version)
        return self._tracer

    def around_verify(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around eagle_sample(verify_input, batch, logits_output, …) -> (predict, accept_lens, accept_index)."""
        result = original(*args, **kwargs)
        self.safe.call(self._verified, args, kwargs, result)
        return result

    def around_prefill(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around _draft_extend_for_prefill(worker, batch, target_hidden_states, next_token_ids, …)."""
        self.safe.call(self._prefilled, args, kwargs)  # before: it shifts the batch's tokens
        return original(*args, **kwargs)

    def _verified(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if self.tracer is not None:
            verified, batch, output = _named(("verify_input", "batch", "logits_output"), args, kwargs)
            self.tracer.round(verified, batch, output, result)

    def _prefilled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.tracer is not None:
            _, batch, features = _named(("self", "batch", "target_hidden_states"), args, kwargs)
            self.tracer.prefill(batch, features)


def _named(names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Arguments by position or by name."""
    return [args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names)]
