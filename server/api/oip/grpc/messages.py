"""The protocol's messages, built from its compiled description.

`open_inference.pb` is what protoc makes of `open_inference.proto`: a description, no code. Its classes live in a pool
of their own, so that another copy of the protocol in the process, such as Triton's client, does not collide with them,
and any version of protobuf will do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

DESCRIPTION: Final = Path(__file__).with_name("open_inference.pb")
SERVICE: Final = "inference.GRPCInferenceService"


def _loaded() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(DESCRIPTION.read_bytes()).file:
        pool.Add(file)
    return pool


_POOL: Final = _loaded()


def message(name: str) -> Any:
    """The class of a message, such as `ModelInferRequest`."""
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"inference.{name}"))


def methods() -> dict[str, tuple[Any, Any]]:
    """Return every call of the service by name, with the classes of its request and its response."""
    service = _POOL.FindServiceByName(SERVICE)
    return {call.name: (message(call.input_type.name), message(call.output_type.name)) for call in service.methods}
