"""Why a request is not answered, in the form in which OpenAI's clients expect it."""

from medplib_jax.data.errors import DataError

UNREAD = (408, 413)  # what is left of such a body is not read


class Refused(Exception):
    """A request that is not answered.

    `status` is the HTTP status, `parameter` the field of the request that is at fault.
    """

    def __init__(self, status: int, message: str, parameter: str | None = None, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.message, self.parameter, self.retry_after = status, message, parameter, retry_after

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"Connection": "close"} if self.status in UNREAD else {})

    def as_dict(self) -> dict:
        kind = (
            "server_error"
            if self.status >= 500
            else "rate_limit_error"
            if self.status == 429
            else "invalid_request_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.parameter, "code": None}}


def told(error: DataError) -> str:
    """What is wrong with something that was uploaded, without the server's own name for the file."""
    return f"{error.what}; expected {error.expected}, found {error.found}"
