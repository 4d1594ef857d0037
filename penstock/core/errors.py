"""Operating errors, named for what the caller can do about them.

PenstockError
├── BadRequest            it can never succeed as it stands; `field` says what to change
│   ├── PromptTooLong     shorten the prompt or serve with a larger --max-model-len
│   ├── UnknownModel      ask for one of the served models
│   ├── UnknownWorker     ask for one of the workers that are up
│   └── UnknownRequest    ask for one of the latest requests
├── Unauthorized          send the API key
├── CapacityExceeded      come back after `retry_after_s`
├── WorkersUnavailable    nobody can take the request: the cluster is starting, draining or dead
├── PeerLost              the worker that had the request died, and its retries are used up
├── BlocksCorrupt         what was copied is not what was offered: pull once more, or recompute
├── DeadlineExceeded      a wait reached its limit
├── StartupFailed         the cluster cannot come up; the message says what to change
└── BackendUnavailable    an optional native part is missing; the message says how to get it

Bugs are assertions, not errors, and expected outcomes (no space, no hit) are return values.
"""


class PenstockError(Exception):
    """Root of every error that Penstock raises on purpose."""


class BadRequest(PenstockError):
    """The request can never succeed as it stands.

    `field` names the offending field of the request body, or is None when the body as a whole is at
    fault.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class PromptTooLong(BadRequest):
    """Prompt and requested output do not fit the context window or the KV cache."""


class UnknownModel(BadRequest):
    """The named model is not served here."""


class UnknownWorker(BadRequest):
    """The named worker is not part of this cluster."""


class UnknownRequest(BadRequest):
    """Nothing is known of the request, or no more."""


class Unauthorized(PenstockError):
    """The API key is missing or wrong."""


class CapacityExceeded(PenstockError):
    """Every queue is full; `retry_after_s` is the honest guess of when that changes."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class WorkersUnavailable(PenstockError):
    """No worker of the needed kind is up."""


class PeerLost(PenstockError):
    """The worker holding the request died and the request could not be continued elsewhere."""


class BlocksCorrupt(PenstockError):
    """The digest of a copied block is not that of the offer."""


class DeadlineExceeded(PenstockError):
    """A wait reached its limit."""


class StartupFailed(PenstockError):
    """The cluster cannot come up; the message says what to change."""


class BackendUnavailable(PenstockError):
    """An optional native part (compiler, library, device) is missing."""
