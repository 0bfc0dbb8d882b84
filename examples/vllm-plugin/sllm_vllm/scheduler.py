"""Clients' drafts for vLLM's own speculation: a scheduler that puts them where a drafter's would be.

vLLM then verifies the drafts of all texts in one pass, as it does a drafter's (V1 model runner).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from vllm.logger import init_logger
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds

from sllm_vllm.arguments import Draft
from sllm_vllm.expected import Expectation

if TYPE_CHECKING:
    from vllm.v1.request import Request

__all__ = ["ClientDrafts"]

logger = init_logger(__name__)


class ClientDrafts(Scheduler):
    """vLLM's scheduler, with the drafts that requests bring along (``sllm_vllm.arguments.Draft``).

    Start the server with ``--scheduler-cls sllm_vllm.scheduler.ClientDrafts --speculative-config '{"method":
    "custom_class", "model": "sllm_vllm.proposer.NoDrafts", "num_speculative_tokens": 8}'``. With one of V1's
    own drafters instead (``{"method": "ngram", ...}``) that one drafts wherever no client does.

    Drafts are used for requests of temperature 0 alone: there the verified text is the plain one. At other
    temperatures vLLM's V1 verifies by rejection sampling, whose text depends on the draft.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.num_spec_tokens:
            raise ValueError(
                "sllm_vllm.scheduler.ClientDrafts verifies nothing without speculation; start vLLM with"
                ' --speculative-config \'{"method": "custom_class", "model": "sllm_vllm.proposer.NoDrafts",'
                ' "num_speculative_tokens": 8}\''
            )
        self._n_vocab = self.vllm_config.model_config.get_vocab_size()
        self._texts: WeakKeyDictionary[Request, Expectation | None] = WeakKeyDictionary()
        self._named: WeakValueDictionary[str, Request] = WeakValueDictionary()

    def add_request(self, request: Request) -> None:
        """Take the draft along; one that is malformed is reported in the log and left out."""
        params = request.sampling_params
        draft = None
        if params is not None:
            try:
                draft = Draft.parse(params.extra_args, self._n_vocab)
            except ValueError as error:
                # Here an exception would end the engine.
                logger.warning("request %s: %s; it goes on without a draft", request.request_id, error)
        if draft is not None and draft.about is not None:
            self._replace(draft)
        elif draft is not None and params is not None and params.temperature == 0:
            start = request.num_prompt_tokens if draft.pos is None else draft.pos
            self._texts[request] = Expectation(draft.tokens, start)
            if draft.stream is not None:
                self._named[draft.stream] = request
        super().add_request(request)

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Put clients' drafts in the place of the drafter's, where there are any."""
        chosen = []
        for name, drafted in zip(draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=True):
            request = self.requests.get(name)
            expected = self._texts.get(request) if request is not None else None
            ahead: list[int] = []
            if request is not None and expected is not None and not request.is_finished():
                expected.follow(request.all_token_ids[expected.length :])
                if expected.length == request.num_tokens:  # else it is about what comes later
                    room = request.max_tokens - request.num_output_tokens - 1  # the pass itself brings one
                    ahead = expected.ahead(max(0, min(self.num_spec_tokens, room)))
            chosen.append(ahead or drafted)
        super().update_draft_token_ids(DraftTokenIds(draft_token_ids.req_ids, chosen))

    def _replace(self, draft: Draft) -> None:
        """A later draft for a text that is being written; for one that is over, nothing."""
        request = self._named.get(draft.about or "")
        if request is not None and draft.pos is not None and not request.is_finished():
            self._texts[request] = Expectation(draft.tokens, draft.pos)
