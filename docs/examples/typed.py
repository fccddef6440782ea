"""The SDK with strict types: what a type checker infers for each call. `make check` runs mypy on it in strict mode."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import assert_type

from lensrack import Answer, AsyncClient, Client, LensrackError, NotFoundError, RawResponse, wire


def labels(client: Client, task: str, folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield the best label of every picture, or the kind of its error."""
    pictures = sorted(folder.glob("*.png"))
    for picture, result in zip(pictures, client.map(task, pictures, errors="return"), strict=True):
        assert_type(result, Answer | LensrackError)
        yield picture, result.label if isinstance(result, Answer) else type(result).__name__


def newest(client: Client, task: str) -> wire.VersionInfo | None:
    try:
        versions = client.tasks.versions(task)
    except NotFoundError as error:
        print(error.code, error.request_id)
        return None
    return versions[0] if versions else None


def predict_raw(client: Client, task: str, picture: Path) -> RawResponse[Answer]:
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
    with Client() as client:
        print(dict(labels(client, "digits", Path())), newest(client, "digits"))
    asyncio.run(side_by_side("digits", [Path("7.png")]))
