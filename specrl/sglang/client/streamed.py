"""Plain decoding on a server that somebody else runs: steps by when their tokens come over HTTP."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

from specrl.core.clock import WallClock
from specrl.core.round import PlainSample
from specrl.sglang.client.errors import ServerFailed
from specrl.sglang.client.launch import Server
from specrl.sglang.client.plain_server import SKIPPED, PlainServer
from specrl.sglang.client.watchdog import standing_by

_SAME = ("version", "revision", "dtype", "quantization", "tp_size")  # of /server_info


class StreamedPlain(PlainServer):
    """Times steps of plain decoding on a server without our plugin; closing leaves it running.

    A step is what lies between two tokens of the request that leads, while all of them are decoding. Where tokens come
    several at once (its --stream-interval, a slow line), their steps share the time alike.

    Args:
        server: without speculation.
        timeout_s: for a sample.
    """

    _STEPS = 16

    @staticmethod
    def _usual(seconds: Sequence[float]) -> float:
        """The mean: single steps say when tokens came, not when they were made."""
        return fmean(seconds)

    def steps(self, texts: Sequence[Sequence[int]], count: int) -> list[PlainSample]:
        """Steps that continue these texts together; see `PlainServer.steps`."""
        clock, context = WallClock(), sum(map(len, texts)) / len(texts)
        rids = [f"plain-{secrets.token_hex(4)}-{index}" for index in range(len(texts))]
        wanted = SKIPPED + count + 1
        sampling = {"temperature": 0.0, "max_new_tokens": wanted, "ignore_eos": True}
        body = {"rid": rids, "input_ids": [list(text) for text in texts], "sampling_params": sampling, "stream": True}
        have = dict.fromkeys(rids, 0)
        at, before = 0, 0.0  # tokens of the leading request when all had begun, and since; when that was
        taken: list[PlainSample] = []
        for said in self.server.client.stream("/generate", body, timeout_s=self._timeout_s):
            if "error" in said:
                raise ServerFailed(f"{self.server.client.url} must decode plainly, but {said['error']}; see its log")
            now, meta = clock.now(), said["meta_info"]
            have[meta["id"]] = meta["completion_tokens"]
            leads = max(have.values())
            if at and at < leads:
                step = (now - before) / (leads - at)
                taken += [PlainSample(len(rids), context + n, step) for n in range(at, leads)]
            if at < leads and min(have.values()):
                at, before = leads, now
        kept = taken[SKIPPED:]
        if not kept:
            raise ServerFailed(
                f"{self.server.client.url} must decode {len(texts)} requests at once, but did not; raise its "
                "--max-running-requests or --max-total-tokens"
            )
        return kept


def check_baseline(server: Server, plain: Server) -> None:
    """Refuse a baseline that is not the same model without speculation.

    Raises:
        ValueError: what differs.
        ServerError: one of them does not answer.
    """
    url = plain.client.url
    algorithm = plain.info.get("speculative_algorithm")
    if algorithm:
        raise ValueError(
            f"plain_url must be a server without speculation, but {url} runs {algorithm}; start one with the same "
            "--model-path and no --speculative flags"
        )
    ours, theirs = (each.client.get("/model_info") for each in (server, plain))
    facts: dict[str, tuple[object, object]] = {"model_path": (_place(ours["model_path"]), _place(theirs["model_path"]))}
    facts |= {name: (server.info.get(name), plain.info.get(name)) for name in _SAME}
    versions = [str(each.get("weight_version")) for each in (ours, theirs)]
    if not versions[0].isdecimal():  # a number is a draft's, by a hot swap
        facts["weight_version"] = (versions[0], versions[1])
    for name, (own, other) in facts.items():
        if own != other:
            raise ValueError(
                f"plain_url must serve what the server does, but {name} is {other!r} at {url} and {own!r} at "
                f"{server.client.url}; start it like the other, without its --speculative flags"
            )


@contextmanager
def paused(server: Server) -> Iterator[None]:
    """Have a server stand still, its requests in place; a process stands by that lets it go on if we are killed."""
    client = server.client
    with standing_by(client.url, client.headers, client.timeout_s) as done:
        try:
            client.post("/pause_generation", {"mode": "in_place"})
            yield
        finally:
            client.post("/continue_generation", {"torch_empty_cache": False})
            done()


def _place(path: str) -> str:
    """A checkpoint's directory, or its name where it is none here."""
    return str(Path(path).resolve()) if Path(path).is_dir() else path
