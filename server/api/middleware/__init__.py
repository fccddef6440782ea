"""What every request passes before a route: admission, authentication, body limits, the request log."""
