"""Errors as OpenAI's clients expect them: {"error": {message, type, param, code}} with a status that says whose fault it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import ArtifactError, GraftworkError, UsageError

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 408: "timeout_error", 429: "rate_limit_error",
         504: "timeout_error"}
#: of errors that are seen before a route is: no such path, another method, ...
CODES = {404: "not_found", 405: "method_not_allowed", 408: "timeout", 413: "request_too_large"}
#: of every answer that is an error, for the OpenAPI document
SCHEMA = {
    "type": "object", "required": ["error"], "additionalProperties": False, "properties": {"error": {
        "type": "object", "required": ["message", "type", "param", "code"], "additionalProperties": False, "properties": {
            "message": {"type": "string", "minLength": 1}, "type": {"type": "string", "minLength": 1},
            "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]}}}}}


class ApiError(Exception):
    """An answer that is an error. param: the field that is wrong. code: for programs."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None,
                 headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class UnknownAdapter(UsageError):
    """A name that no adapter has."""


class Unavailable(GraftworkError):
    """The engine takes no requests: it has failed, or the server is about to stop."""


def api_error(error: BaseException) -> ApiError:
    """What a client is told. Faults that are not the request's are named only where they help."""
    if isinstance(error, ApiError):
        return error
    text = str(error)
    if isinstance(error, GraftworkError):
        text = error.message if error.remedy is None else f"{error.message}; remedy: {error.remedy}"
    if isinstance(error, UnknownAdapter):
        return ApiError(404, text, param="model", code="model_not_found")
    if isinstance(error, Unavailable):
        return ApiError(503, text, code="unavailable", headers={"retry-after": "5"})
    if isinstance(error, ArtifactError):  # the client chose it, and sending the request again would not help
        return ApiError(400, text, param="model", code="adapter_unusable")
    if isinstance(error, GraftworkError):
        return ApiError(400, text, code="invalid_value")
    return ApiError(500, "the server made a mistake; its log names this request's x-request-id", code="internal_error")


def unknown_model(name: str, param: str = "model") -> ApiError:
    """One answer for names that are not there and names that the key may not use, so that a key cannot list the others' adapters."""
    return ApiError(404, f"the model '{name[:200]}' does not exist, or this key may not use it; GET /v1/models lists what there is",
                    param=param, code="model_not_found")
