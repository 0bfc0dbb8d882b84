"""A cloud behind an OpenAI-compatible API, through the ``openai`` package (the optional extra ``openai``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sllm.errors import AuthError, RemoteError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from typing_extensions import Self

__all__ = ["OpenAICloud"]


class OpenAICloud:
    """An endpoint with the chat-completions API; for :class:`sllm.Hybrid`.

    Args:
        model: the model's name at the endpoint.
        base_url: the endpoint, such as ``https://host/v1``; None: the package's own default or
            ``OPENAI_BASE_URL``.
        api_key: None: ``OPENAI_API_KEY``.
        timeout: seconds for one request.
        client: an ``openai.OpenAI`` to use in place of one made of these three.

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
            RemoteError: the endpoint does not answer, or breaks off; the message does not repeat what was
                sent.
            AuthError: the endpoint refuses the key.

        """
        ended = False
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
                        ended = ended or choice.finish_reason is not None
                        # Some send a last choice without a delta.
                        if choice.delta is not None and choice.delta.content:
                            yield choice.delta.content
        except self._openai.APIStatusError as error:
            kind = AuthError if error.status_code in (401, 403) else RemoteError
            raise kind(f"{self.model}: the endpoint answered with HTTP status {error.status_code}") from None
        except Exception as error:  # noqa: BLE001 - its own errors, and those of what it stands on (a broken
            # stream, an event that is no JSON, a key that no header can hold), which may quote what was sent
            raise RemoteError(f"{self.model}: {type(error).__name__}") from None
        if not ended:
            # A closed connection looks like the end of an answer; only a finish_reason says that it is.
            raise RemoteError(f"{self.model}: the stream ended before the answer did")

    def count(self, text: str) -> int:
        """An estimate of the number of tokens: a quarter of the Latin letters plus the other characters."""
        n_latin = sum(char.isascii() for char in text)
        return -(-n_latin // 4) + len(text) - n_latin

    def close(self) -> None:
        """Close the client's connections."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()
