"""HTTP: routes, and the services that they call, scoped to a tenant. No other room knows of requests."""
