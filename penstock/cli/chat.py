"""`penstock chat`: a conversation in the terminal.

Text streams to stdout as it comes; figures and hints go to stderr, dimly, so that the output of a
piped conversation is the answers alone.
"""

import sys
from argparse import Namespace
from contextlib import closing, suppress

from penstock.cli.client import Answer, ChatClient
from penstock.core.errors import BadRequest, PenstockError

PROMPT = "> "
_HINT = "Ctrl-C stops an answer, /reset forgets the conversation, /quit ends."


def chat(options: Namespace) -> int:
    """Talk until the input ends; return the exit code.

    Raises: `PenstockError` when there is no server to talk to.
    """
    client = ChatClient(options.url, options.api_key)
    model = options.model or client.first_model()
    conversation = Conversation(client, model, options)
    is_person = sys.stdin.isatty()
    if is_person:
        with suppress(ImportError):
            import readline  # noqa: F401  its import gives input() a history
        _note(f"{model} at {client.url}. {_HINT}")
    is_well = True
    while True:
        try:
            line = input(PROMPT if is_person else "").strip()
        except EOFError:
            return 0 if is_well else 1
        if line == "/quit":
            return 0
        if line == "/reset":
            conversation.reset()
            _note("the conversation is forgotten")
        elif line.startswith("/"):
            _note(f"there is no {line}. {_HINT}")
        elif line:
            is_well = conversation.say(line) and is_well


class Conversation:
    """The messages so far."""

    def __init__(self, client: ChatClient, model: str, options: Namespace) -> None:
        self._client = client
        self._options = {
            "model": model,
            "max_tokens": options.max_tokens,
            "temperature": options.temperature,
            "seed": options.seed,
        }
        self._system = options.system
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages: list[dict[str, str]] = []
        if self._system:
            self.messages.append({"role": "system", "content": self._system})

    def say(self, text: str) -> bool:
        """Send a message and print the answer as it comes; False when there was none.

        What was not answered is not remembered. Ctrl-C keeps what has come of the answer so far.
        """
        asked = {"role": "user", "content": text}
        body: dict[str, object] = {k: v for k, v in self._options.items() if v is not None}
        body["messages"] = [*self.messages, asked]
        answer = Answer()
        try:
            with closing(self._client.chat(body, answer)) as pieces:
                for piece in pieces:
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            answer.finish_reason = "stopped"
        except PenstockError as error:
            print(flush=True)
            _note(f"{error}{_advice(error)}")
            return False
        print(flush=True)
        self.messages += [asked, {"role": "assistant", "content": answer.text}]
        _note(_figures(answer))
        return True


def _advice(error: PenstockError) -> str:
    if isinstance(error, BadRequest) and "token" in str(error):
        return " (/reset starts a new conversation)"
    return ""


def _figures(answer: Answer) -> str:
    parts = [f"first token after {answer.ttft_s * 1000:.0f} ms"]
    if answer.num_tokens > 1 and answer.decode_s:
        rate = (answer.num_tokens - 1) / answer.decode_s
        parts.append(f"{answer.num_tokens} tokens, {rate:.0f} per second")
    if answer.finish_reason != "stop":
        parts.append(f"ended by {answer.finish_reason}")
    return ", ".join(parts)


def _note(text: str) -> None:
    is_terminal = sys.stderr.isatty()
    print(f"\x1b[2m{text}\x1b[0m" if is_terminal else text, file=sys.stderr, flush=True)
