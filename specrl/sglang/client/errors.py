"""What a server may answer instead of an answer; each says what to do."""

from __future__ import annotations


class ServerError(OSError):
    """A server did not do what it was asked."""


class ServerGone(ServerError):
    """Nobody answers at its address, or it hung up."""


class ServerSilent(ServerError):
    """It took longer than it had."""


class ServerRefuses(ServerError):
    """It wants another API key."""


class ServerBusy(ServerError):
    """It had no room for a request all the while."""


class ServerOutOfMemory(ServerError):
    """It, or its device, has no memory left."""


class ServerFailed(ServerError):
    """It could not do it, or would not."""


class SwapError(ServerError):
    """It did not answer, or did not take new weights; then it was told to go on with what it has."""


_NO_MEMORY = ("out of memory", "outofmemory", "not enough memory", "memory capacity", "no available memory")
MORE_MEMORY = "lower --max-running-requests or --context-length, or set --mem-fraction-static for what the device has"


def is_out_of_memory(text: str) -> bool:
    """Whether a message is about memory that there is none of."""
    return any(sign in text.lower() for sign in _NO_MEMORY)


def of_status(status: int, url: str, said: str) -> ServerError:
    """What an HTTP status other than 200 means."""
    said = " ".join(said.split())[:300] or "nothing else"
    if status in (401, 403):
        return ServerRefuses(f"{url} wants a valid API key, but said {status}; pass api_key=, its --api-key")
    if status == 429:
        return ServerBusy(f"{url} had no room for a request in time (429: {said}); wait, or send fewer at once")
    if is_out_of_memory(said):
        return ServerOutOfMemory(f"{url} is out of memory ({status}: {said}); {MORE_MEMORY}")
    if status < 500:
        return ServerFailed(f"{url} must take the request, but said {status}: {said}; is it SGLang, with its flags?")
    return ServerFailed(f"{url} failed ({status}: {said}); see its log, then start it again")
