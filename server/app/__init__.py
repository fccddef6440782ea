"""The composition root: what each process is built of. The only room that names concrete backends."""
