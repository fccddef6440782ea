"""What `import lensrack` gives, and what it costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import lensrack
from lensrack import errors

SURFACE = [
    "Answer",
    "ApiError",
    "AsyncClient",
    "AsyncJobHandle",
    "AuthenticationError",
    "BadRequestError",
    "Client",
    "ConflictError",
    "ConnectError",
    "DeadlineError",
    "Evaluation",
    "ImageInput",
    "InvalidInput",
    "JobFailed",
    "JobHandle",
    "LensrackError",
    "ManyAnswers",
    "NotFoundError",
    "PreconditionFailedError",
    "Progress",
    "ProtocolError",
    "RateLimitedError",
    "RawResponse",
    "Reply",
    "RequestTimeout",
    "ServerError",
    "TooLargeError",
    "UnavailableError",
    "UnsupportedMediaError",
    "__version__",
]


def loaded_by(code: str) -> set[str]:
    program = f"import sys, json\n{code}\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_the_public_surface_is_pinned() -> None:
    assert lensrack.__all__ == SURFACE
    assert all(hasattr(lensrack, name) for name in SURFACE)


def test_every_error_is_exported_and_drawn() -> None:
    kinds = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert kinds <= set(lensrack.__all__)
    assert all(name in (errors.__doc__ or "") for name in kinds)


def test_errors_are_also_what_python_calls_them() -> None:
    assert issubclass(lensrack.RequestTimeout, TimeoutError)
    assert issubclass(lensrack.ConnectError, ConnectionError)
    assert issubclass(lensrack.InvalidInput, ValueError)
    assert issubclass(lensrack.UnavailableError, lensrack.ServerError)


def test_importing_loads_nothing_heavy() -> None:
    heavy = {"torch", "numpy", "typer", "PIL", "server", "prompts_store", "timm"}
    assert not loaded_by("from lensrack import *") & heavy


def test_nothing_is_loaded_before_it_is_asked_for() -> None:
    assert not loaded_by("import lensrack") & {"httpx", "pydantic", "anyio"}
    assert "httpx" not in loaded_by("import lensrack; lensrack.wire.Ready")
    assert "httpx" in loaded_by("import lensrack; lensrack.Client")


def test_public_names_are_what_their_modules_have() -> None:
    assert lensrack.Client is lensrack.client.Client
    assert lensrack.ApiError is lensrack.errors.ApiError
    assert set(SURFACE) <= set(dir(lensrack))
    with pytest.raises(AttributeError, match="no attribute 'Cleint'"):
        lensrack.Cleint  # noqa: B018


def test_rich_comes_in_only_where_httpx_itself_brings_it() -> None:
    """httpx imports its own command line, hence rich, where it finds click installed; lensrack adds nothing to that."""
    added = loaded_by("from lensrack import *") - loaded_by("import httpx, pydantic, anyio.to_thread")
    assert not added & {"rich", "click", "pygments"}


def test_the_package_is_typed() -> None:
    assert (Path(lensrack.__file__).parent / "py.typed").is_file()
