"""`graft claims`: published claims, each checked by one command."""

from __future__ import annotations

from pathlib import Path

import typer

EPILOG = ("Examples: graft claims list --kind parameter_count | graft claims show galore_state | "
          "graft claims run galore_state -o runs/claims | graft claims run --first15 --share 1/2 -o runs/claims | "
          "graft claims table -o runs/claims")
ACTIONS = ("list", "show", "run", "table")


def run(
    action: str = typer.Argument(..., help="list, show NAME, run NAME..., or table."),
    names: list[str] = typer.Argument(None, help="Names of claims (graft claims list), or .yaml files of your own."),
    every: bool = typer.Option(False, "--all", help="run: every claim."),
    first: bool = typer.Option(False, "--first15", help="run: those to run first."),
    quick: bool = typer.Option(False, "--quick", help="run: one rate, one seed, few steps; the verdict says so."),
    full: bool = typer.Option(False, "--full", help="run: as published in the results (the default)."),
    kind: str = typer.Option(None, "--kind", help="list, run --all: only claims checked this way."),
    group: str = typer.Option(None, "--group", help="list, run --all: only this group (adapters, optimizers, ...)."),
    output: Path = typer.Option(Path("claims"), "-o", "--output", help="Folder of results and cells; a run that was ended goes on there."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
    missing: bool = typer.Option(False, "--missing", help="run: only claims that have no result in the folder, or have changed since."),
    share: str = typer.Option("1/1", "--share", help="run: i/n, the i-th of n parts, for as many processes that share the folder."),
    quiet: bool = typer.Option(False, "--quiet", help="No progress."),
) -> None:
    """Check published claims of this field: memory at true scale, counts, identities, and scaled-down quality, speed and serving."""
    from ..errors import UsageError, nearest

    if action not in ACTIONS:
        raise UsageError(f"there is no action '{action}'{nearest(action, ACTIONS)}", remedy=f"graft claims {' | '.join(ACTIONS)}")
    if quick and full:
        raise UsageError("--quick and --full exclude each other", remedy="choose one of the two")
    if action == "list":
        show_list(selected(kind, group), as_json)
    elif action == "show":
        show(names, as_json)
    elif action == "table":
        from ..claims.table import page, results

        print(page(results(output), f"graft claims table -o {output}"))
    else:
        found = shared(chosen(names or [], every, first, kind, group), share)
        if missing:
            from ..claims.run import has_result

            found = [c for c in found if not has_result(c, output, quick=quick)]
        run_all(found, output, quick, as_json, quiet)


def selected(kind: str | None, group: str | None) -> list:
    """All claims of a kind and a group. Raises UsageError with the nearest name."""
    from ..claims.claim import claims
    from ..errors import UsageError, nearest

    known = list(claims().values())
    for option, value, names in (("kind", kind, {c.kind for c in known}), ("group", group, {c.group for c in known})):
        if value is not None and value not in names:
            raise UsageError(f"no claim has the {option} '{value}'{nearest(value, names)}", remedy=f"{option}s: {', '.join(sorted(names))}")
    return [c for c in known if kind in (None, c.kind) and group in (None, c.group)]


def chosen(names: list[str], every: bool, first: bool, kind: str | None, group: str | None) -> list:
    from ..claims.claim import find
    from ..errors import UsageError

    if bool(names) + every + first != 1:
        raise UsageError("which claims?", remedy="graft claims run NAME..., or --all, or --first15")
    if names:
        return [find(name) for name in names]
    return [c for c in selected(kind, group) if every or c.first]


def shared(found: list, share: str) -> list:
    """The claims of one process, in the order they run in. share: i/n."""
    import re

    from ..claims.claim import shares
    from ..errors import UsageError

    part, parts = map(int, share.split("/")) if re.fullmatch(r"[1-9]\d?/[1-9]\d?", share) else (1, 0)
    if part > parts:
        raise UsageError(f"--share {share} is no part", remedy="--share 1/2 in one process and --share 2/2 in another, same claims in both")
    return shares(found, parts)[part - 1]


def show_list(found: list, as_json: bool) -> None:
    import json

    if as_json:
        print(json.dumps([c.to_json() for c in found]))
        return
    width = max((len(c.name) for c in found), default=0)
    for claim in found:
        first = f"[{claim.first}] " if claim.first else ""
        print(f"{claim.name:<{width}}  {claim.kind:<17}  {claim.minutes:>4g} min  {first}{claim.system}: {claim.statement}")
    print(f"{len(found)} claims, {sum(c.minutes for c in found) / 60:.1f} hours of one core")


def show(names: list[str] | None, as_json: bool) -> None:
    import json

    import yaml

    from ..claims.claim import find
    from ..claims.kinds import kind_of
    from ..errors import UsageError

    if not names:
        raise UsageError("show what?", remedy="graft claims show NAME; graft claims list has the names")
    found = [find(name) for name in names]
    if as_json:
        print(json.dumps([c.to_json() for c in found]))
        return
    for claim in found:
        print(yaml.safe_dump(claim.to_json(), sort_keys=False, allow_unicode=True, width=120))
        print(f"# {claim.kind}: {kind_of(claim.kind).about}")


def run_all(found: list, output: Path, quick: bool, as_json: bool, quiet: bool) -> None:
    """One after the other; a claim that cannot be run does not stop those after it, and the exit code is 1 in the end. The minutes that
    progress shows are those of the claims' files, so they are too many where runs are kept, and too few on a busy machine."""
    import json
    import sys

    from ..claims.run import run_claim
    from ..claims.table import describe
    from ..errors import GraftworkError
    from ..files import disk_errors

    made, failed = [], []
    for i, claim in enumerate(found):
        after = sum(c.minutes for c in found[i + 1:])
        tell = None if quiet else bar(f"{i + 1}/{len(found)} {claim.name}", None if quick else (claim.minutes, after))
        try:
            with disk_errors(output):
                made.append(run_claim(claim, output, quick=quick, tell=tell))
        except GraftworkError as error:
            if len(found) == 1 or error.exit_code == 130:  # interrupted: what is done is kept
                raise
            failed.append(claim.name)
            print(f"{claim.name} was not checked: {error.message}", file=sys.stderr, flush=True)
            continue
        if not as_json:
            print(describe(made[-1]), flush=True)
    if as_json:
        print(json.dumps(made))
    if failed:
        raise typer.Exit(1)


def bar(label: str, minutes: tuple[float, float] | None = None):
    """tell(done, total, cell): a moving line on a terminal, else a line a cell. minutes: (of this claim, of those after it)."""
    import sys

    shown: list[tuple[int, str]] = []

    def tell(done: int, total: int, cell: str) -> None:
        ended = done >= total
        left = "" if minutes is None else f", {minutes[0] * (1 - done / max(total, 1)) + minutes[1]:.0f} min left"
        text = f"{label} [{'#' * (20 * done // max(total, 1)):<20}] {done}/{total} {cell}{left}"
        if sys.stderr.isatty():
            print(f"\r\x1b[K{text}", end="\n" if ended else "", file=sys.stderr, flush=True)
        elif (done, cell) not in shown:
            print(text, file=sys.stderr, flush=True)
        shown.append((done, cell))

    return tell
