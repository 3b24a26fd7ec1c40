"""What a request can be refused with; each format shows it in its own shape."""

from __future__ import annotations


class ServeError(Exception):
    """status: HTTP's; 422 is "what the request says is wrong", which formats may number otherwise (400).

    param: the field it is about. code: OpenAI's word for it. retry_after: seconds, for 429 and 503.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.retry_after = status, code, retry_after
        self.message, self.param = encodable(message), None if param is None else encodable(param)

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def encodable(text: str) -> str:
    """JSON can carry halves of surrogate pairs, UTF-8 cannot; messages quote what was sent."""
    return text.encode(errors="replace").decode()
