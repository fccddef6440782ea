"""The SDK: its classes and methods with their docstrings."""

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
    ("Evaluation", lensrack.Evaluation),
    ("ManyAnswers", lensrack.ManyAnswers),
    ("RawResponse", lensrack.RawResponse),
)


def page() -> str:
    error_docs = inspect.cleandoc(lensrack.errors.__doc__ or "").partition("\n\n")[2]
    tree, _, rest = error_docs.partition("\n\n")
    return f"{HEAD}\n```text\n{inspect.cleandoc(tree)}\n```\n\n{rest}\n" + "".join(_group(*group) for group in GROUPS)


def _group(name: str, kind: type) -> str:
    lines = [f"\n## {name}\n", inspect.getdoc(kind) or "", ""]
    if kind is client.Client:
        lines.append(_signed("Client", kind.__init__))
    for word, member in vars(kind).items():
        if word.startswith("_") or word == "mro":
            continue
        if isinstance(member, property):
            lines.append(f"**`{word}`** {inspect.getdoc(member) or ''}\n")
        elif inspect.isfunction(member):
            lines += [_signed(word, member), inspect.getdoc(member) or "", ""]
    return "\n".join(lines)


def _signed(name: str, function: Any) -> str:
    signature = inspect.signature(function)
    without_self = list(signature.parameters.values())[1:]
    parameters = [parameter.replace(annotation=_short(parameter.annotation)) for parameter in without_self]
    text = str(signature.replace(parameters=parameters, return_annotation=_short(signature.return_annotation)))
    return f"```python\n{name}{text.replace(chr(39), '')}\n```\n"


def _short(annotation: Any) -> Any:
    return annotation if annotation is inspect.Parameter.empty else str(annotation)
