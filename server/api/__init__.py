"""HTTP: services and tenants as routes see them; nothing below knows of requests."""
