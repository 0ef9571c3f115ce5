"""What a request is answered with when it is not served, in OpenAI's shape."""

from __future__ import annotations

import logging
import math
from typing import Any

from pydantic import ValidationError

from ..errors import InputError
from .requests import Overloaded

_log = logging.getLogger("vitcop_compile")
# Characters of a message, and of the name of a field: some quote what they were given.
_LONGEST, _LONGEST_NAME = 600, 80


class Refused(Exception):
    """A request that is answered with an error. status: HTTP's; param: the field that is at fault; code: a word for programs;
    retry_after: seconds after which it may be sent again, None where that would not help."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's errors."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        param = None if self.param is None else _shortened(self.param, _LONGEST_NAME)
        return {"error": {"message": _shortened(str(self), _LONGEST), "type": kind, "param": param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Retry-After, whole seconds, where it would help."""
        return {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most] + " ..."


def closing(retry_after: float = 5.0) -> Refused:
    """The refusal of a server that ends."""
    return Refused(503, "the server is closing: send the request again, it may reach another", None, "closing", retry_after)


def stopped(name: str) -> Refused:
    """The refusal of a model whose scheduler has ended by an error, which is for the log."""
    return Refused(503, f"{name} has stopped, the server's log says why: restart it", None, "stopped")


def refusal_of(error: Exception) -> Refused:
    """The refusal for what was raised while a request was served. What nobody raised on purpose goes to the log."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, Overloaded):
        return Refused(429, str(error), None, "overloaded", error.retry_after)
    if isinstance(error, InputError):
        return Refused(400, str(error), None, "invalid_input")
    _log.error("a request failed", exc_info=error)
    return Refused(
        500, f"the model failed on this request ({type(error).__name__}): the server's log says more", None, "failed"
    )


def refusal_of_body(error: ValidationError) -> Refused:
    """400 for a body that is not as the schema says; the field that is at fault is named."""
    first = error.errors(include_url=False, include_input=False)[0]
    path = [_shortened(str(part), _LONGEST_NAME) for part in first["loc"]]
    if path[:1] == ["prompt"]:
        del path[1:2]  # which kind of a prompt it was taken for
    param = ".".join(path) or None
    if first["type"] == "json_invalid":
        return Refused(400, f"the body is not JSON: {first['msg']}", None, "invalid_json")
    if first["type"] == "extra_forbidden":
        return Refused(
            400,
            f"{param} is not supported here, and would change nothing: leave it out (docs/serving.md lists what is)",
            param,
            "unsupported_field",
        )
    if first["type"] == "missing":
        return Refused(400, f"{param} is missing", param, "missing_field")
    return Refused(400, f"{param or 'the body'}: {first['msg'].removeprefix('Value error, ')}", param, "invalid_value")
