"""Looking at the cluster and changing it, over HTTP."""

import asyncio
from collections.abc import Awaitable, Callable

import httpx

from penstock.core.errors import UnknownWorker
from penstock.core.types import Role, WorkerId
from penstock.server.app import create_app
from penstock.server.settings import ServerSettings
from tests.server.double import ScriptedService, byte_model, client, text_script

Asked = list[tuple[object, ...]]


class Notebook:
    """An administration that writes down what it was asked for."""

    def __init__(self) -> None:
        self.asked: Asked = []

    def start_workers(self, role: Role, count: int) -> tuple[WorkerId, ...]:
        self.asked.append(("start", role, count))
        return tuple(WorkerId(f"{role.value}-{n}") for n in range(count))

    def retire_worker(self, worker_id: WorkerId) -> None:
        if worker_id == "nobody":
            raise UnknownWorker("there is no worker nobody", "worker")
        self.asked.append(("retire", worker_id))

    def set_role(self, worker_id: WorkerId, role: Role | None, *, is_pinned: bool) -> Role:
        self.asked.append(("role", worker_id, role, is_pinned))
        return Role.PREFILL


def tell(story: Callable[[httpx.AsyncClient], Awaitable[None]], *keys: str) -> Asked:
    notebook = Notebook()

    async def run() -> None:
        service = ScriptedService(text_script("x"))
        settings = ServerSettings(api_keys=keys)
        async with client(create_app(service, byte_model(), settings, notebook)) as http:
            await story(http)

    asyncio.run(run())
    return notebook.asked


def test_the_cluster_is_shown_as_the_controller_sees_it():
    async def story(http: httpx.AsyncClient) -> None:
        shown = (await http.get("/cluster")).json()
        status = ScriptedService(text_script("x")).status()
        assert [worker["id"] for worker in shown["workers"]] == [
            worker.info.worker_id for worker in status.workers
        ]
        for worker in shown["workers"]:
            assert worker["state"] == "up"
            assert {"role", "host", "epoch", "pid", "assigned", "transports"} <= set(worker)
        assert {"queued", "prefilling", "decoding", "finished", "retried"} <= set(shown)

    tell(story)


def test_workers_are_started_and_retired():
    async def story(http: httpx.AsyncClient) -> None:
        started = await http.post("/cluster/workers", json={"role": "decode", "count": 2})
        assert (started.status_code, started.json()) == (202, {"started": ["decode-0", "decode-1"]})
        leaving = await http.delete("/cluster/workers/decode-1")
        assert (leaving.status_code, leaving.json()) == (202, {"leaving": "decode-1"})

    assert tell(story) == [("start", Role.DECODE, 2), ("retire", "decode-1")]


def test_roles_are_switched_pinned_and_set_free():
    async def story(http: httpx.AsyncClient) -> None:
        body = {"worker": "prefill-0", "new_role": "decode"}
        switched = await http.post("/pd_role_switch", json=body)
        assert switched.json() == body | {"old_role": "prefill", "is_pinned": True}
        free = await http.post("/pd_role_switch", json={"worker": "p", "is_pinned": False})
        assert free.json()["new_role"] == "prefill"
        assert (await http.post("/pd_role_switch", json={"worker": "p", "role": 1})).is_error

    assert tell(story) == [
        ("role", "prefill-0", Role.DECODE, True),
        ("role", "p", None, False),
    ]


def test_what_makes_no_sense_is_refused_with_the_field():
    async def story(http: httpx.AsyncClient) -> None:
        for body, field in (
            ({"role": "cook"}, "role"),
            ({}, "role"),
            ({"role": "decode", "number": 2}, "number"),
            ({"role": "decode", "count": "two"}, "count"),
        ):
            refused = await http.post("/cluster/workers", json=body)
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == field, refused.text
        unknown = await http.delete("/cluster/workers/nobody")
        assert unknown.status_code == 404
        assert unknown.json()["error"]["code"] == "worker_not_found"

    assert tell(story) == []


def test_a_body_without_end_is_not_read():
    async def story(http: httpx.AsyncClient) -> None:
        refused = await http.post("/cluster/workers", content=b'{"role": "' + b"x" * 100_000)
        assert refused.status_code == 413

    assert tell(story) == []


def test_a_server_with_a_key_asks_for_it():
    async def story(http: httpx.AsyncClient) -> None:
        assert (await http.get("/cluster")).status_code == 401
        assert (await http.delete("/cluster/workers/decode-0")).status_code == 401
        own = {"Authorization": "Bearer secret"}
        assert (await http.get("/cluster", headers=own)).status_code == 200

    assert tell(story, "secret") == []


def test_where_workers_are_fixed_that_is_said():
    async def run() -> None:
        service = ScriptedService(text_script("x"))
        async with client(create_app(service, byte_model(), ServerSettings())) as http:
            refused = await http.post("/cluster/workers", json={"role": "decode"})
            assert refused.status_code == 501

    asyncio.run(run())
