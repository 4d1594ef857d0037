"""The table of errors."""

import json

import pytest

from penstock.core import errors as core_errors
from penstock.core.errors import BadRequest, CapacityExceeded, PenstockError, PromptTooLong
from penstock.server.errors import (
    ERROR_KINDS,
    error_body,
    error_headers,
    error_kind,
    http_error_body,
)


def _core_classes() -> list[type[PenstockError]]:
    found = vars(core_errors).values()
    return [c for c in found if isinstance(c, type) and issubclass(c, PenstockError)]


@pytest.mark.parametrize("cls", _core_classes())
def test_every_class_of_the_core_has_its_own_entry(cls):
    assert cls in ERROR_KINDS


def test_a_subclass_takes_its_parents_entry():
    class Special(PromptTooLong):
        pass

    assert error_kind(Special("x")) is ERROR_KINDS[PromptTooLong]


def test_the_error_object_is_openais():
    assert json.loads(error_body(BadRequest("too hot", "temperature"))) == {
        "error": {
            "message": "too hot",
            "type": "invalid_request_error",
            "param": "temperature",
            "code": "invalid_value",
        }
    }


def test_only_the_servers_own_faults_are_5xx():
    client = {c for c, kind in ERROR_KINDS.items() if kind.status < 500}
    assert {c.__name__ for c in client} == {
        "BadRequest", "PromptTooLong", "UnknownModel", "BodyTooLarge", "BodyTooSlow",
        "Unauthorized", "CapacityExceeded",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "header", "header_ms"), [(0.2, b"1", b"200"), (2.5, b"3", b"2500"), (0, b"1", b"1")]
)
def test_capacity_says_when_to_come_back(seconds, header, header_ms):
    headers = dict(error_headers(CapacityExceeded("full", seconds)))
    assert headers == {b"retry-after": header, b"retry-after-ms": header_ms}


def test_router_errors_have_the_same_form():
    error = json.loads(http_error_body(405, "GET /x: no"))["error"]
    assert error == {
        "message": "GET /x: no",
        "type": "invalid_request_error",
        "param": None,
        "code": "method_not_allowed",
    }
    assert json.loads(http_error_body(500))["error"]["type"] == "server_error"
