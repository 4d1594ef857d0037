"""What is served and how: the model as the API sees it, and the limits of the HTTP side.

The command line fills both in; every other module of the package reads them.
"""

from dataclasses import dataclass

from msgspec import Struct

from penstock.core.types import KIB, MIB
from penstock.server.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model as clients see it. It answers to each of `names`; responses about it use the first.

    `vocab_size` is the number of rows of the embedding: any id below it may be in a prompt.
    `created` is a Unix time in seconds.
    """

    names: tuple[str, ...]
    tokenizer: Tokenizer
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    created: int = 0


class ServerSettings(Struct, frozen=True, kw_only=True):
    """Limits and switches of the HTTP side.

    `max_choices` bounds the sequences of one request (prompts times `n`). Text of more than
    `encode_inline_chars` is tokenised in a thread. A reader that is `stream_buffer_bytes` behind,
    or has taken nothing for `stall_timeout_s`, is given up. With `accepts_loss` KV may come back
    from a lossy tier, unless a body says that it must be exact. With `accepts_window` a body may
    ask for decoding that looks at a window, or at the part of the prompt that its end looks at.
    """

    api_keys: tuple[str, ...] = ()
    version: str = ""
    is_logging_requests: bool = False
    max_body_bytes: int = 16 * MIB
    body_timeout_s: float = 60.0
    max_choices: int = 128
    max_requests: int = 4096
    encode_inline_chars: int = 4 * KIB
    encode_threads: int = 2
    accepts_loss: bool = False
    accepts_window: bool = False
    stream_buffer_bytes: int = MIB
    stall_timeout_s: float = 60.0
