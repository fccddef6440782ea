"""Progress for people in programs of their own: bars at a terminal, lines in a notebook and in a log.

    from lensrack.progress import upload_bar, watch

    with upload_bar("pictures") as progress:
        dataset = client.datasets.upload("pictures", progress=progress)
    job = watch(client.train("fruit", dataset.id))

`client` is a `lensrack.Client`.
"""

from __future__ import annotations

from ._progress import upload_bar, watch

__all__ = ["upload_bar", "watch"]
