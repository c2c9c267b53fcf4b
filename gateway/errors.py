"""Errors that know their answer: code, reason, scope and when to try again. Standard library only."""

from collections.abc import Sequence


class NearloopError(Exception):
    """Base of all errors that a client can see.

    code is a gRPC status name; reason is stable and UPPER_SNAKE_CASE; retry_after_s is None when unknown.
    """

    code = "INTERNAL"
    reason = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        scope: str = "",
        policy: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or type(self).reason
        self.scope = scope
        self.policy = policy
        self.retry_after_s = retry_after_s


class InvalidStep(NearloopError):
    """The request is wrong, whatever the state of the system; `fields` are (field, description) pairs."""

    code = "INVALID_ARGUMENT"
    reason = "INVALID_STEP"

    def __init__(self, fields: Sequence[tuple[str, str]], *, reason: str | None = None) -> None:
        super().__init__("; ".join(f"{name}: {text}" for name, text in fields), reason=reason)
        self.fields = tuple(fields)


class Unauthenticated(NearloopError):
    code = "UNAUTHENTICATED"
    reason = "API_KEY_INVALID"


class NotFound(NearloopError):
    code = "NOT_FOUND"
    reason = "NOT_FOUND"


class AlreadyExists(NearloopError):
    """An idempotency key was used again for another step."""

    code = "ALREADY_EXISTS"
    reason = "IDEMPOTENCY_KEY_REUSED"


class Rejected(NearloopError):
    """A policy said no, or a queue is full."""

    code = "RESOURCE_EXHAUSTED"
    reason = "OVERLOADED"


class Denied(Rejected):
    """A policy said no, and will say no again."""

    code = "PERMISSION_DENIED"
    reason = "DENIED"


class Expired(NearloopError):
    code = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_EXCEEDED"


class Cancelled(NearloopError):
    code = "CANCELLED"
    reason = "CANCELLED"


class Unavailable(NearloopError):
    """A part is down; the same request can succeed later."""

    code = "UNAVAILABLE"
    reason = "UNAVAILABLE"


class StepFailed(NearloopError):
    """The target failed; code and reason come from the worker."""

    reason = "STEP_FAILED"

    def __init__(self, message: str, *, code: str = "INTERNAL", reason: str | None = None) -> None:
        super().__init__(message, reason=reason)
        self.code = code


class TopologyMismatch(NearloopError):
    """An existing stream or consumer differs from what the configuration asks for."""

    code = "FAILED_PRECONDITION"
    reason = "TOPOLOGY_MISMATCH"


class ConfigError(Exception):
    """All mistakes of a configuration at once; `problems` has one sentence each."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        mistakes = "1 mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
        super().__init__(f"{source}: {mistakes}\n" + "\n".join(f"  - {problem}" for problem in problems))
