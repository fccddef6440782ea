"""The SDK with strict types: what a type checker knows of each call. `make check` holds it to mypy's strictest."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import assert_type

from lensrack import Answer, AsyncClient, Client, LensrackError, NotFoundError, RawResponse, wire


def labels(client: Client, task: str, folder: Path) -> Iterator[tuple[Path, str]]:
    """The best label of every picture, or the code of what went wrong with it."""
    pictures = sorted(folder.glob("*.png"))
    for picture, told in zip(pictures, client.map(task, pictures, errors="return"), strict=True):
        assert_type(told, Answer | LensrackError)
        yield picture, told.label if isinstance(told, Answer) else type(told).__name__


def newest(client: Client, task: str) -> wire.VersionInfo | None:
    try:
        versions = client.tasks.versions(task)
    except NotFoundError as error:
        print(error.code, error.request_id)
        return None
    return versions[0] if versions else None


def asked(client: Client, task: str, picture: Path) -> RawResponse[Answer]:
    raw = client.with_options(timeout=5, max_retries=0).raw_response(lambda c: c.predict(task, picture))
    assert_type(raw.value, Answer)
    print(raw.status, raw.request_id, raw.timings_s)
    return raw


async def side_by_side(task: str, pictures: list[Path]) -> list[Answer]:
    async with AsyncClient(client_resize=True) as client:
        answers = await client.predict(task, pictures)
        assert_type(answers, list[Answer])
        assert_type(await client.predict(task, pictures[0]), Answer)
        return answers


if __name__ == "__main__":
    with Client() as here:
        print(dict(labels(here, "digits", Path())), newest(here, "digits"))
    asyncio.run(side_by_side("digits", [Path("7.png")]))
