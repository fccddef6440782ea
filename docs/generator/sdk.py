"""The SDK: its classes, methods and what they say of themselves."""

from __future__ import annotations

import inspect
from typing import Any

import lensrack
from lensrack import client

HEAD = """# Python SDK

`pip install lensrack`, without torch; `lensrack[resize]` adds Pillow for `client_resize`. `AsyncClient` has the same
methods with `await`; its groups and handles are called `AsyncTasks`, `AsyncDatasets`, `AsyncJobs` and `AsyncJobHandle`;
iterators need `async for`. Images are paths, bytes, open binary files, Pillow images or uint8 arrays
[H, W, 3]; never URLs. Calls can raise:
"""
GROUPS = (
    ("Client", client.Client),
    ("client.tasks", client.Tasks),
    ("client.datasets", client.Datasets),
    ("client.jobs", client.Jobs),
    ("JobHandle", lensrack.JobHandle),
    ("Answer", lensrack.Answer),
    ("ManyAnswers", lensrack.ManyAnswers),
    ("RawResponse", lensrack.RawResponse),
)


def page() -> str:
    drawn = inspect.cleandoc(lensrack.errors.__doc__ or "").partition("\n\n")[2]
    tree, _, rest = drawn.partition("\n\n")
    return f"{HEAD}\n```text\n{inspect.cleandoc(tree)}\n```\n\n{rest}\n" + "".join(_group(*group) for group in GROUPS)


def _group(name: str, kind: type) -> str:
    told = [f"\n## {name}\n", inspect.getdoc(kind) or "", ""]
    if kind is client.Client:
        told.append(_signed("Client", kind.__init__))
    for word, member in vars(kind).items():
        if word.startswith("_") or word == "mro":
            continue
        if isinstance(member, property):
            told.append(f"**`{word}`** {inspect.getdoc(member) or ''}\n")
        elif inspect.isfunction(member):
            told += [_signed(word, member), inspect.getdoc(member) or "", ""]
    return "\n".join(told)


def _signed(name: str, function: Any) -> str:
    signature = inspect.signature(function)
    own = [one.replace(annotation=_short(one.annotation)) for one in list(signature.parameters.values())[1:]]
    shown = str(signature.replace(parameters=own, return_annotation=_short(signature.return_annotation)))
    return f"```python\n{name}{shown.replace(chr(39), '')}\n```\n"


def _short(annotation: Any) -> Any:
    return annotation if annotation is inspect.Parameter.empty else str(annotation)
