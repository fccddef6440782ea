"""Middleware before the routes: request log, authentication, body limits, admission, fast path."""
