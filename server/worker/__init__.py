"""The worker: it claims a job, reads its data set, fits, evaluates, and publishes the version."""
