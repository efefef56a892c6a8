"""What the runs learned: ranks and layers, spectra, scores, samples."""

from __future__ import annotations

import re
from html import escape

from . import drawings
from .runs import Run
from .scores import read_scores
from .section import Section, missing
from .sites import final_grid, over_steps, short_names
from .spectra import role_of


def sites(runs: list[Run]) -> Section:
    section = Section("Ranks and selected layers")
    have = [run for run in runs if run.maps()]
    for number, run in enumerate(have):
        for what, steps in run.maps().items():
            of, end = (f" of {run.name}", f"-{number + 1}") if len(runs) > 1 else ("", "")
            slug, what_of = re.sub("[^a-z0-9]+", "-", what.lower()).strip("-")[:40], what[:1].upper() + what[1:]
            lines, columns, values, note = over_steps(steps)
            figure = drawings.heat(f"map-{slug}{end}", f"{what_of} over the steps{of}", lines, columns, values, "step", what,
                                   labels=short_names(lines))
            figure.note = f"{note} {figure.note}".strip()
            section.figures.append(figure)
            grid = final_grid(steps)
            if grid is not None:
                section.figures.append(drawings.heat(f"map-{slug}-end{end}", f"{what_of} at the end{of}, by layer and map", *grid, "map",
                                                     what))
    section.left_out = missing(runs, have, "no selection of the recipe moves ranks or chooses layers")
    return section


def spectra(runs: list[Run]) -> Section:
    section = Section("Spectra of the learned changes")
    have = [run for run in runs if run.spectra and run.spectra.get("sites")]
    for number, run in enumerate(have):
        found, panels = run.spectra["sites"], {}
        for site, numbers in found.items():
            panels.setdefault(role_of(site), {})[site] = numbers["values"]
        rows = [{"site": site, "out x in": " x ".join(map(str, n["shape"])), "norm": n["frobenius"], "stable rank": n["stable_rank"],
                 "effective rank": n["effective_rank"], "largest": n["values"][0], "8th": n["values"][7] if len(n["values"]) > 7 else None,
                 "values": len(n["values"])} for site, n in found.items()]
        of, end = (f" of {run.name}", f"-{number + 1}") if len(runs) > 1 else ("", "")
        figure = drawings.spectra(f"spectra{end}", f"Singular values of the learned changes{of}", panels, rows)
        if len(found) < (run.spectra.get("of") or 0):
            figure.note += f" {len(found)} of {run.spectra['of']} sites, of evenly spaced layers."
        figure.note = f"{figure.note} {run.spectra.get('note') or ''}".strip()
        section.figures.append(figure)
    reasons: dict[str, list[Run]] = {}
    for run in [run for run in runs if run not in have]:
        why = (run.spectra or {}).get("left_out") or "none in the run folder (graft report RUN --spectra 24 computes them)"
        reasons.setdefault(why, []).append(run)
    for why, lacking in reasons.items():
        section.left_out += missing(runs, [run for run in runs if run not in lacking], why)
    return section


def evaluations(runs: list[Run]) -> Section:
    section, rows = Section("Scores"), []
    have = []
    for run in runs:
        found, said = read_scores(run.folder, run.name)
        rows += found
        have += [run] if found else []
        section.left_out += [f"Left out: {line}." for line in said]
    if rows:
        section.figures.append(drawings.scores("scores", "Scores with 95 % bootstrap intervals", rows))
    section.rows = rows
    section.left_out += missing(runs, have, "no evaluation in the run folder (graft eval RUN --data F --output RUN/eval/TASK.jsonl)")
    return section


def samples(runs: list[Run]) -> Section:
    section, parts = Section("Samples before and after"), []
    for run in runs:
        parts += [f"<h3>{escape(run.name)}</h3>"] if len(runs) > 1 and run.samples else []
        for row in run.samples:
            entries = "".join(f"<div><dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd></div>" for key, value in row.items()
                              if value is not None)
            parts.append(f'<div class="sample"><dl>{entries}</dl></div>\n')
    section.html = "".join(parts)
    why = "no samples in the run folder (graft report RUN --samples 4 writes them, where rows are held out)"
    section.left_out = missing(runs, [r for r in runs if r.samples], why)
    return section
