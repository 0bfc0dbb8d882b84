"""A cloud behind an OpenAI-compatible API, through the ``openai`` package (the optional extra ``openai``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sllm.errors import AuthError, RemoteError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from typing_extensions import Self

__all__ = ["OpenAICloud"]


class OpenAICloud:
    """An endpoint that speaks the chat-completions API; for :class:`sllm.Hybrid`.

    Args:
        model: its name there.
        base_url: the endpoint, such as ``https://host/v1``; None: the package's own default or
            ``OPENAI_BASE_URL``.
        api_key: None: ``OPENAI_API_KEY``.
        timeout: seconds for one request.
        client: a client of one's own in place of the three.

    Raises:
        ImportError: the package is not installed.
        AuthError: there is no key.

    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout: float = 60.0,
        client: Any = None,
    ) -> None:
        try:
            import openai
        except ImportError:
            raise ImportError("OpenAICloud needs the openai package: pip install 'sllm[openai]'") from None
        self._openai = openai
        self.model = model
        if client is None:
            try:
                client = openai.OpenAI(base_url=base_url, api_key=api_key, timeout=timeout, max_retries=2)
            except openai.OpenAIError as error:
                raise AuthError(f"no client of {base_url or 'the default endpoint'}: {error}") from None
        self._client = client

    def stream(self, messages: Sequence[Mapping[str, Any]], max_tokens: int) -> Iterator[str]:
        """The answer to a conversation, piece by piece.

        Raises:
            RemoteError: it does not answer; the message does not repeat what was sent.

        """
        try:
            chunks = self._client.chat.completions.create(
                model=self.model,
                messages=[dict(message) for message in messages],
                max_tokens=max_tokens,
                stream=True,
            )
            with chunks:
                for chunk in chunks:
                    for choice in chunk.choices[:1]:
                        if choice.delta.content:
                            yield choice.delta.content
        except self._openai.APIStatusError as error:
            kind = AuthError if error.status_code in (401, 403) else RemoteError
            raise kind(f"{self.model}: the endpoint answered with HTTP status {error.status_code}") from None
        except self._openai.OpenAIError as error:
            raise RemoteError(f"{self.model}: {type(error).__name__}") from None

    def count(self, text: str) -> int:
        """About how many tokens a text has: a quarter of its Latin letters, and its other characters."""
        n_latin = sum(char.isascii() for char in text)
        return -(-n_latin // 4) + len(text) - n_latin

    def close(self) -> None:
        """Close the client's connections."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()
