"""Who may have a text written now, and who waits."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from sllm.openai_server.places import Places
from sllm.openai_server.problems import RequestError

if TYPE_CHECKING:
    from collections.abc import Coroutine


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 30))


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_in_the_order_of_asking() -> None:
    async def main() -> list[int]:
        places = Places(["only"], 8, 60)
        order: list[int] = []
        go = asyncio.Event()

        async def one(number: int) -> None:
            async with places.taken() as place:
                assert place == "only"
                await go.wait()
                order.append(number)

        tasks = [asyncio.create_task(one(i)) for i in range(5)]
        await settle()
        go.set()
        await asyncio.gather(*tasks)
        return order

    assert run(main()) == [0, 1, 2, 3, 4]


def test_no_more_wait_than_may() -> None:
    async def main() -> RequestError:
        places = Places([1], 1, 60)
        async with places.taken():
            waiting = asyncio.create_task(places.taken().__aenter__())
            await settle()
            with pytest.raises(RequestError) as caught:
                async with places.taken():
                    pass
            waiting.cancel()
            with suppress(asyncio.CancelledError):
                await waiting
        async with places.taken():  # nothing is left taken
            return caught.value

    problem = run(main())
    assert (problem.status, problem.code) == (429, "rate_limit_exceeded")
    assert int(problem.headers["retry-after"]) >= 1


def test_nobody_waits_for_longer_than_is_allowed() -> None:
    async def main() -> None:
        places = Places([1], 8, 0.02)
        async with places.taken():
            with pytest.raises(RequestError, match="none was free within"):
                async with places.taken():
                    pass
        async with places.taken():
            pass

    run(main())


@pytest.mark.parametrize("given", [False, True], ids=["while waiting", "as the place comes"])
def test_who_leaves_the_queue_takes_no_place(*, given: bool) -> None:
    async def main() -> None:
        places = Places([1], 8, 60)
        first = places.taken()
        await first.__aenter__()

        async def wait() -> None:
            async with places.taken():
                raise AssertionError

        waiting = asyncio.create_task(wait())
        await settle()
        if given:
            await first.__aexit__(None, None, None)  # the place is the task's, which has not run yet
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        if not given:
            await first.__aexit__(None, None, None)
        async with places.taken():
            pass

    run(main())
