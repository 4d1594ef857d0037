"""Answers a generation with one body, when all of it is there.

Owns the texts until then. `app.py` calls it.
"""

import asyncio
from collections.abc import Callable, Sequence

from starlette.types import Receive, Send

from penstock.server.asgi import Doorbell, respond, watch
from penstock.server.choice import Choice
from penstock.server.errors import Headers
from penstock.server.generation import Generation


async def respond_whole(
    generation: Generation,
    write: Callable[[Sequence[str]], bytes],
    receive: Receive,
    send: Send,
    headers: Headers,
) -> None:
    """Serve until the generation ends or the client goes away. `write` makes the body of the texts.

    Raises: what ended the generation; nothing has been sent then.
    """
    pieces: list[list[str]] = [[] for _ in generation.choices]
    bell = Doorbell()
    is_gone = False

    def take(choice: Choice, text: str) -> None:
        pieces[choice.index].append(text)

    def leave() -> None:
        nonlocal is_gone
        is_gone = True
        bell.ring()

    generation.start(take, bell.ring)
    watcher = asyncio.get_running_loop().create_task(watch(receive, leave))
    try:
        await bell.wait()
    finally:
        watcher.cancel()
        generation.cancel()
    if is_gone:
        return
    if generation.failure is not None:
        raise generation.failure
    await respond(send, 200, write(["".join(parts) for parts in pieces]), headers)
