"""What a request can be refused with; each format shows it in its own shape."""

from __future__ import annotations


class ServeError(Exception):
    """status: HTTP's; 422 is "what the request says is wrong", which formats may number otherwise (400).

    param: the field it is about. retry_after: seconds, for 429 and 503.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.retry_after = status, message, param, retry_after

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
