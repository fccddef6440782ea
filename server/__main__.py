"""The lensrack server: serve predictions, fit training jobs, and manage keys, stores and backbones."""

from __future__ import annotations

import os

# Set before torch is imported, which reads them once. Idle threads must not spin beside a worker's. oneDNN's generated
# code for each shape is large, and by default two caches keep 1,024 of them: oneDNN's, and that of ideep, through which
# PyTorch calls it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
os.environ.setdefault("LRU_CACHE_CAPACITY", "256")

import typer

from server.cli import bundles, keys, samples, stores, tools
from server.cli.serve import serve
from server.cli.work import work

cli = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
cli.command()(serve)
cli.command()(work)
cli.command()(samples.sample)
cli.command()(samples.sample_tasks)
cli.command()(bundles.backbones)
cli.command("import")(bundles.import_)
cli.command("export")(bundles.export)
cli.command(context_settings=tools.REST)(tools.pretrain)
cli.command(context_settings=tools.REST)(tools.bench)
cli.add_typer(keys.cli, name="keys")
cli.add_typer(stores.cli, name="store")

if __name__ == "__main__":
    cli()
