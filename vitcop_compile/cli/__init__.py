"""The command line: `vitcop-compile`."""

import typer

from . import batch, bench, demo, explain, export, regress, serve, tune, view, warmup

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Visual-token pruning compiled into the graphs of large vision-language models.",
)
# `--help` lists them in this order.
app.command("export")(export.export_command)
app.command("run")(export.run_command)
app.command("serve")(serve.serve_command)
app.command("batch")(batch.batch_command)
app.command("warmup")(warmup.warmup_command)
app.command("bench")(bench.bench_command)
app.command("plot")(bench.plot_command)
app.command("regress")(regress.regress_command)
app.command("explain")(explain.explain_command)
app.command("tune")(tune.tune_command)
app.command("view")(view.view_command)
app.command("demo")(demo.demo_command)
