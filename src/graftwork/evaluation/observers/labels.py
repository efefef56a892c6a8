"""The label of each row: fields label and label_predicted (None: none of the labels).

Of rows with choices it is the most likely choice, of others the answer that is written (or what --extract finds in it). The labels are
then --labels, else those that the rows have.
"""

from __future__ import annotations

from ...errors import DataError, nearest
from . import observe as run


def observe(view) -> None:
    chosen = view.tasks[0].choices is not None
    run("choices" if chosen else "answers", view)
    rows = [row for rows in view.rows.values() for row in rows]
    if chosen:
        for row in rows:
            row["label"], row["label_predicted"] = row["choices"][row["right"]], row["choices"][row["chosen"]]
        return
    if not all(task.answers for task in view.tasks):
        bare = next(task for task in view.tasks if not task.answers)
        raise DataError(f"{bare.source}: the row has no answer that could be a label",
                        remedy="metrics of labels want rows with a prompt and an answer, with choices, or with a label")
    known = set(view.settings.labels or {row["compared_references"][0] for row in rows})
    for row in rows:
        row["label"] = row["compared_references"][0]
        if row["label"] not in known:
            raise DataError(f"{row['source']}: the label {row['label']!r} is none of --labels{nearest(row['label'], known)}",
                            remedy=f"labels: {', '.join(sorted(known))}")
        accepted = row["compared"] in row["compared_references"]  # any accepted answer stands for the row's label
        row["label_predicted"] = row["label"] if accepted else row["compared"] if row["compared"] in known else None
