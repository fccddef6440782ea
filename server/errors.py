"""All errors that a caller can get: a status, a stable code and a sentence.

    ServiceError
    ├── BadRequest 400        bad_request, bad_task_name, bad_image, bad_archive, bad_dataset, bad_bundle,
    │                         ambiguous_version
    ├── Unauthenticated 401   unauthenticated                       + WWW-Authenticate
    ├── Forbidden 403         forbidden, foreign_origin
    ├── NotFound 404          task_not_found, version_not_found, alias_not_found, dataset_not_found, job_not_found,
    │                         upload_not_found, feedback_not_found, picture_not_found, key_not_found,
    │                         model_not_found
    ├── Silent 408            upload_silent, body_timeout
    ├── Conflict 409          alias_conflict, idempotency_conflict, wrong_backbone, job_finished, version_in_use,
    │                         no_history, upload_busy, upload_offset_conflict, upload_incomplete, upload_finished,
    │                         no_feedback, nothing_new, feedback_full, no_parent_dataset, key_exists,
    │                         labels_differ, geometry_differs
    ├── PreconditionFailed 412  precondition_failed
    ├── TooLarge 413          body_too_large, image_too_large
    ├── UnsupportedMedia 415  unsupported_media_type, unsupported_image
    ├── Misdirected 421       unknown_host
    ├── Unprocessable 422     invalid_request, unknown_method, method_not_servable, bad_alias, unknown_label,
    │                         bad_checkpoint, no_head, unknown_format, not_exportable, bad_pixels
    ├── QueueFull 429         queue_full, too_many_uploads, rate_limited, quota_exceeded   + Retry-After
    ├── Internal 500          internal, engine_failed, corrupt_bundle, corrupt_aliases
    ├── NotInstalled 501      not_installed
    ├── Unavailable 503       rack_full, shutting_down, store_unavailable, not_ready, engine_unavailable,
    │                         too_many_connections    + Retry-After
    ├── DeadlineExceeded 504  deadline_exceeded
    └── DiskFull 507          disk_full

The API turns these into RFC 9457 problem documents; nothing else of a failure reaches a client. `detail` is written for
the person who reads it: it names what was expected and what came, and never a server path or an internal name.
"""

from __future__ import annotations


class ServiceError(Exception):
    """A failure with an HTTP status and a stable machine-readable code.

    `extra` travels in the problem document beside the standard members (RFC 9457, section 3.2).
    """

    status = 500
    code = "internal"
    retry_after_s: float | None = None

    def __init__(
        self, detail: str, *, code: str | None = None, retry_after_s: float | None = None, **extra: object
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.code = code or type(self).code
        self.retry_after_s = retry_after_s if retry_after_s is not None else type(self).retry_after_s
        self.extra = extra


class BadRequest(ServiceError):
    status, code = 400, "bad_request"


class Unauthenticated(ServiceError):
    status, code = 401, "unauthenticated"


class Forbidden(ServiceError):
    status, code = 403, "forbidden"


class NotFound(ServiceError):
    status, code = 404, "not_found"


class Silent(ServiceError):
    status, code = 408, "upload_silent"


class Conflict(ServiceError):
    status, code = 409, "conflict"


class PreconditionFailed(ServiceError):
    status, code = 412, "precondition_failed"


class TooLarge(ServiceError):
    status, code = 413, "body_too_large"


class UnsupportedMedia(ServiceError):
    status, code = 415, "unsupported_media_type"


class Misdirected(ServiceError):
    status, code = 421, "unknown_host"


class Unprocessable(ServiceError):
    status, code = 422, "invalid_request"


class QueueFull(ServiceError):
    status, code, retry_after_s = 429, "queue_full", 1.0


class Internal(ServiceError):
    status, code = 500, "internal"


class NotInstalled(ServiceError):
    """The request needs packages of an extra."""

    status, code = 501, "not_installed"


class Unavailable(ServiceError):
    status, code, retry_after_s = 503, "not_ready", 1.0


class DeadlineExceeded(ServiceError):
    status, code = 504, "deadline_exceeded"


class DiskFull(ServiceError):
    status, code = 507, "disk_full"
