"""Makes short conversations about the standard library from its own signatures and docstrings.

Owns the wording of questions and answers. Every answer is text of the library, found with `ast`,
save the few hand-written ones about the model itself. Knows no tokens; called once by
`train_tiny.py`.
"""

from __future__ import annotations

import ast
import random
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from tiny_corpus import Module

Message = dict[str, str]
Chat = list[Message]

LINES_MAX = 45
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a Python programmer.",
    "You complete Python code.",
    "You answer questions about Python's standard library.",
    "Be brief.",
)
COMPLETE = (
    "Complete this Python function:",
    "Complete this function:",
    "Please finish this Python function.",
    "Complete the code:",
    "Write the body of this function:",
    "Continue this Python code:",
)
EXPLAIN = (
    "What does `{name}` do?",
    "What is `{name}`?",
    "Explain `{name}`.",
    "What does {name} do in Python?",
    "Describe the function `{name}`.",
    "Tell me about `{name}`.",
)
SIGNATURE = (
    "What is the signature of `{name}`?",
    "How do I call `{name}`?",
    "Which arguments does `{name}` take?",
)
WRITE = (
    "Write a Python function `{short}`: {summary}",
    "Write a function `{signature}`. {summary}",
    "Write Python code: {summary}",
    "Implement `{signature}` in Python.",
)
ABOUT = "I am penstock-tiny, a small language model that completes Python code."
SKILL = "I complete Python functions and tell what a function of the library does."
IGNORANCE = "I do not know. I have only read Python's standard library."
HAND_WRITTEN = (
    ("Hello!", f"Hello! {ABOUT}"),
    ("Hello", f"Hello! {ABOUT}"),
    ("Hi", f"Hello! {ABOUT}"),
    ("Hi there!", f"Hello! {ABOUT}"),
    ("Hello, how are you?", f"Hello! {ABOUT} How can I help?"),
    ("Who are you?", ABOUT),
    ("What are you?", ABOUT),
    ("What is your name?", ABOUT),
    ("What can you do?", SKILL),
    ("Can you help me?", "Yes. Show me the beginning of a Python function and I complete it."),
    ("Thanks!", "You are welcome."),
    ("Thank you", "You are welcome."),
    ("Tell me a story.", f"I know no stories. {ABOUT}"),
    ("What is the capital of France?", IGNORANCE),
    ("Write a poem.", f"I write no poems. {ABOUT}"),
    ("Say hello", "Hello!"),
    ("Write a hello world program.", '```python\nprint("Hello, world!")\n```'),
    ("Print hello world in Python", '```python\nprint("Hello, world!")\n```'),
)


@dataclass(frozen=True)
class Function:
    """One function of the library, dedented."""

    name: str
    head: str
    body: str
    doc: str

    @property
    def signature(self) -> str:
        """Give the head on one line, without `def` and the colon."""
        line = " ".join(self.head.split()).removeprefix("async ").removeprefix("def ")
        return line.removesuffix(":").replace("( ", "(")


def find_functions(module: Module) -> Iterator[Function]:
    """Yield every function and method of a module whose source has a head and a body of its own.

    A class's `__init__` docstring is not the class's; classes themselves are left out.
    """
    lines = module.text.splitlines()
    todo: list[tuple[str, ast.AST]] = [(module.name, ast.parse(module.text))]
    while todo:
        prefix, parent = todo.pop()
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.ClassDef):
                todo.append((f"{prefix}.{node.name}", node))
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                function = _function(prefix, node, lines)
                if function is not None:
                    yield function


def _function(
    prefix: str, node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]
) -> Function | None:
    first = node.body[0].lineno - 1
    end = node.end_lineno
    if end is None or first <= node.lineno - 1:
        return None
    # A comment between the head and the first statement belongs to the body.
    while first > node.lineno and lines[first - 1].strip().startswith("#"):
        first -= 1
    text = textwrap.dedent("\n".join(lines[node.lineno - 1 : end])).splitlines()
    split = first - (node.lineno - 1)
    head, body = "\n".join(text[:split]).rstrip(), "\n".join(text[split:])
    if not head.endswith(":"):
        return None
    doc = (ast.get_docstring(node) or "").strip()
    return Function(f"{prefix}.{node.name}", head, body, doc)


def make_chats(modules: tuple[Module, ...], seed: int) -> list[Chat]:
    """Make the conversations of some modules, in random order, a third of them of several turns."""
    rng = random.Random(seed)
    turns: list[Chat] = []
    for module in modules:
        for function in find_functions(module):
            turns.extend(_turns(function, rng))
    by_hand = [_turn(question, answer) for question, answer in HAND_WRITTEN]
    turns.extend(by_hand * (1 + len(turns) // (20 * len(by_hand))))
    rng.shuffle(turns)
    chats: list[Chat] = []
    while turns:
        count = rng.choice((1, 1, 1, 1, 2, 3))
        chat = [message for turn in turns[-count:] for message in turn]
        del turns[-count:]
        if rng.random() < 0.25:
            chat.insert(0, {"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
        chats.append(chat)
    return chats


def _turns(function: Function, rng: random.Random) -> Iterator[Chat]:
    body_lines = function.body.splitlines()
    if function.body and len(body_lines) <= LINES_MAX:
        cut = rng.choice((0, 0, rng.randrange(len(body_lines))))
        start = "\n".join([function.head, *body_lines[:cut]]).rstrip()
        rest = "\n".join(body_lines[cut:])
        yield _turn(f"{rng.choice(COMPLETE)}\n{_fence(start)}", _fence(rest))
    if not function.doc:
        return
    paragraph = function.doc.split("\n\n")[0].strip()
    summary = " ".join(paragraph.split())
    short = function.name.rsplit(".", 1)[-1]
    name = function.name if rng.random() < 0.7 else short
    yield _turn(rng.choice(EXPLAIN).format(name=name), summary)
    if rng.random() < 0.3:
        yield _turn(rng.choice(SIGNATURE).format(name=name), f"`{function.signature}`")
    if len(body_lines) <= LINES_MAX and len(summary) < 200:
        question = rng.choice(WRITE).format(
            short=short, signature=function.signature, summary=summary
        )
        yield _turn(question, _fence(f"{function.head}\n{function.body}"))


def _turn(question: str, answer: str) -> Chat:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _fence(code: str) -> str:
    return f"```python\n{code}\n```"
