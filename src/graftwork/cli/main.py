"""`graft`: the verbs. Modules of verbs import torch only inside their functions, so that `graft --help` is quick."""

from __future__ import annotations

import os
import sys

# Before torch and its neighbours are imported: what they print on import is no news to a user.
for _name, _value in {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR", "TOKENIZERS_PARALLELISM": "false",
                      "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                      "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "BITSANDBYTES_NOWELCOME": "1",
                      # threads that spin while another process has their core made a training step five times slower
                      "GOMP_SPINCOUNT": "10000"}.items():
    os.environ.setdefault(_name, _value)

import importlib
import pkgutil
import warnings

import typer

from .. import cli
from ..errors import GraftworkError

#: order in which --help lists the verbs
ORDER = ("demo", "init", "methods", "validate", "plan", "train", "sweep", "eval", "report", "generate", "chat", "quantize", "merge",
         "convert", "serve", "claims", "doctor")

#: packages whose warnings concern their own developers
NEIGHBOURS = ("torch", "transformers", "accelerate", "datasets", "bitsandbytes", "peft", "huggingface_hub", "multiprocess", "google")

app = typer.Typer(
    name="graft", no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Adapt a foundation model within a memory budget, and use thousands of the results from one machine.\n\n"
         "Start with: graft demo | graft init --data rows.jsonl -o recipe.yaml | graft plan recipe.yaml | graft train recipe.yaml")


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from importlib.metadata import version as installed

        print(installed("graftwork"))
        raise typer.Exit()


def _register() -> None:
    """One module per verb: it defines `run` (the command) and may define EPILOG (an example shown under --help)."""
    names = {m.name for m in pkgutil.iter_modules(cli.__path__) if not m.name.startswith("_")} - {"main"}
    for name in sorted(names, key=lambda n: ORDER.index(n.removesuffix("_")) if n.removesuffix("_") in ORDER else 99):
        module = importlib.import_module(f"graftwork.cli.{name}")
        if hasattr(module, "run"):
            app.command(name.removesuffix("_"), epilog=getattr(module, "EPILOG", None))(module.run)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: runs a verb and turns errors into one message and an exit code (0 fine, 1 failure, 2 wrong use,
    130 interrupted). Warnings of other packages are silenced for the time, unless GRAFT_DEBUG=1."""
    if not app.registered_commands:
        _register()
    with warnings.catch_warnings():
        if os.environ.get("GRAFT_DEBUG") != "1":
            for package in NEIGHBOURS:
                warnings.filterwarnings("ignore", module=rf"{package}(\.|$)")
            warnings.filterwarnings("ignore", message=".*swigvarlink.*")
        _run(arguments)


def _run(arguments: list[str] | None) -> None:
    try:
        code = app(args=arguments, prog_name="graft", standalone_mode=False)  # what typer.Exit carried; verbs return None
        if code == 130:
            raise KeyboardInterrupt
        if isinstance(code, int) and code:
            sys.exit(code)
    except GraftworkError as error:
        _fail(error, error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's usage errors
            context = getattr(error, "ctx", None)
            if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help
                print(error.format_message(), file=sys.stderr)
                sys.exit(error.exit_code)
            if context is not None:
                print(context.get_usage(), file=sys.stderr)
            print(f"error: {error.format_message()}", file=sys.stderr)
            if context is not None:
                print(f"  remedy: {context.command_path} --help", file=sys.stderr)
            sys.exit(error.exit_code)
        _fail(error, 1)


def _fail(error: BaseException, code: int) -> None:
    if os.environ.get("GRAFT_DEBUG") == "1":
        raise error
    if isinstance(error, GraftworkError):
        print(f"error: {error.message}", file=sys.stderr)
        if error.remedy:
            print(f"  remedy: {error.remedy}", file=sys.stderr)
    else:
        first = str(error).strip().split("\n")[0] or type(error).__name__
        print(f"error: {type(error).__name__}: {first}", file=sys.stderr)
        print("  remedy: this one was not foreseen; GRAFT_DEBUG=1 shows where it happened", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
