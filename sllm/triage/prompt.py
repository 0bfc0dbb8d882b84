"""The prompt of a conversation, with or without reasoning before the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sllm.engine.chat_template import thinking_off

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import numpy.typing as npt

__all__ = ["prompt_of"]


def prompt_of(target: Any, messages: Sequence[Mapping[str, Any]], *, thinking: bool) -> npt.NDArray[np.int32]:
    """The prompt by the chat template of a target, int32 (n,).

    Args:
        target: with ``chat()``, and ``chat_template`` if reasoning is to be switched off.
        messages: the conversation.
        thinking: False: the answer comes without reasoning first, where the template has a switch for that.

    Raises:
        UnsupportedModelError: no chat template, or it does not render.

    """
    off = {} if thinking else thinking_off(getattr(target, "chat_template", None))
    prompt: npt.NDArray[np.int32] = target.chat(messages, variables=off) if off else target.chat(messages)
    return prompt
