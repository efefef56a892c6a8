"""Tasks of lm-eval (EleutherAI's language model evaluation harness) on a model and its grafts, through lm-eval's own API.

lm-eval owns the tasks, prompts, metrics and standard errors; what it asks of a model (log-likelihoods, rolling log-likelihoods, answers
up to a stop text) is answered by our batched likelihoods and decoding, under a graft or the bare base. So a graft of any method and a
storage of any format is scored as it stands, without a merge. Texts become tokens as in lm-eval's own class for Transformers models: the
tokenizer's special tokens in front, the same windows but for one token, since ours hold the last scored token too. A test compares them.

An extra (`lm-eval`): it brings scikit-learn, nltk and more. Tasks load their data by the datasets library: from the Hub unless it is in
the cache or the task names local files; HF_HUB_OFFLINE=1 is honored. Tasks that run code of the model are refused by lm-eval itself.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import DataError, UsageError, nearest
from ..modeling.state import state_of
from ..serving.generate import context_length, generate
from .likelihood import likelihoods

#: tokens of context where a model names no limit, as in lm-eval
CONTEXT = 2048


def check_installed() -> None:
    """Raises UsageError without lm-eval."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("lm-eval is not installed", remedy="pip install 'graftwork[lm-eval]'")


def language_model(model: nn.Module, tokenizer: Any, *, adapter: str | None = None, routed: bool = False, batch_size: int = 16,
                   progress: Callable[[str, int, int], None] | None = None) -> Any:
    """An `lm_eval.api.model.LM` for simple_evaluate(model=...). routed: every row is answered by `adapter` (None: the bare base); else the
    model answers as it stands."""
    check_installed()
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    length = context_length(model) or CONTEXT

    def say(stage: str):
        return None if progress is None else lambda done, total: progress(stage, done, total)

    class GraftworkLM(TemplateLM):
        """Answers lm-eval's requests."""

        def __init__(self):
            super().__init__()
            self.tokenizer, self._device = tokenizer, model.get_input_embeddings().weight.device

        @property
        def eot_token_id(self):
            return tokenizer.eos_token_id

        @property
        def prefix_token_id(self):
            return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id

        @property
        def tokenizer_name(self):
            return str(tokenizer.name_or_path).replace("/", "__")

        def tok_encode(self, string, add_special_tokens=None, **unused):
            first = tokenizer.decode(self.prefix_token_id)
            if add_special_tokens is None:
                add_special_tokens = not (first and string.startswith(first))
            return tokenizer.encode(string, add_special_tokens=add_special_tokens)

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, **unused):
            rows = []
            for _, context, continuation in requests:
                ids = (list(context) + list(continuation))[-length:]
                start = max(len(ids) - len(continuation), 1)
                rows.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
            found = likelihoods(model, tokenizer, rows, [adapter] * len(rows) if routed else None, batch_size=batch_size,
                                progress=say("likelihoods"))
            return [(-one.nll, one.right == one.tokens) for one in found]

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            windows = [[make_disjoint_window(each) for each in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id, max_seq_len=length - 1, context_len=1)]
                for request in requests]
            flat = self._loglikelihood_tokens([(None, *window) for row in windows for window in row])
            values = iter(value for value, _ in flat)
            return [sum(itertools.islice(values, len(row))) for row in windows]

        def generate_until(self, requests, disable_tqdm=False):
            groups, answers = {}, [""] * len(requests)
            for i, request in enumerate(requests):
                groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
            for members in groups.values():
                options = normalize_gen_kwargs(requests[members[0]].args[1], 256)
                stops = [text for text in handle_stop_sequences(options.get("until"), eos=tokenizer.decode(self.eot_token_id)) if text]
                new = options["max_gen_toks"]
                if new >= length:
                    raise UsageError(f"the task asks for {new} tokens, the model's context has {length}", remedy="choose a shorter task")
                prompts = [self.tok_encode(requests[i].args[0])[-(length - new):] for i in members]
                heat = options.get("temperature", 0.0) if options.get("do_sample") else 0.0
                written = generate(model, tokenizer, prompts, adapters=[adapter] * len(members) if routed else None, max_new_tokens=new,
                                   stop=stops, batch_size=batch_size, temperature=heat, top_p=options.get("top_p", 1.0),
                                   top_k=options.get("top_k", 0) if heat else 0, numbers=members, progress=say("answers"))
                for i, completion in zip(members, written):
                    answers[i] = completion.text
            return answers

        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            return tokenizer.apply_chat_template(chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                                                 continue_final_message=not add_generation_prompt)

    return GraftworkLM()


def run_tasks(model: nn.Module, tokenizer: Any, tasks: Sequence[str], *, include_path: str | Path | None = None, adapter: str | None = None,
              routed: bool = False, num_fewshot: int | None = None, limit: int | None = None, chat: bool = False, batch_size: int = 16,
              seed: int = 0, progress: Callable[[str, int, int], None] | None = None) -> dict[str, Any]:
    """{"TASK/METRIC": value, "TASK/METRIC_interval": value -+ 1.96 of lm-eval's standard error, "TASK/n": rows}.

    include_path: a folder with tasks of one's own (YAML). Raises UsageError for unknown tasks, DataError when their data cannot be had."""
    check_installed()
    import lm_eval
    from lm_eval.tasks import TaskManager

    own = None if include_path is None else TaskManager(include_path=str(include_path), include_defaults=False)
    if own is not None and tasks and set(tasks) <= set(own.all_tasks):
        manager = own  # reading the index of lm-eval's own thousands of files takes half a minute
    else:
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown or not tasks:
        raise UsageError(f"lm-eval has no task '{', '.join(unknown)}'{nearest(unknown[0], manager.all_tasks) if unknown else ''}",
                         remedy="`lm-eval ls tasks` lists them; --lm-eval-path FOLDER adds your own")
    if routed and adapter is not None and adapter not in state_of(model).grafts:
        raise UsageError(f"no graft is named '{adapter}'{nearest(adapter, state_of(model).grafts)}")
    answerer = language_model(model, tokenizer, adapter=adapter, routed=routed, batch_size=batch_size, progress=progress)
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        found = lm_eval.simple_evaluate(model=answerer, tasks=list(tasks), num_fewshot=num_fewshot, limit=limit, task_manager=manager,
                                        apply_chat_template=chat, log_samples=False, bootstrap_iters=1000, random_seed=seed,
                                        numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed)
    except (ConnectionError, FileNotFoundError) as error:
        raise DataError(f"the data of {', '.join(tasks)} cannot be loaded: {str(error).splitlines()[0]}",
                        remedy="load it once with the network on, or name a task with local files (--lm-eval-path)") from None
    finally:
        logger.setLevel(level)
    return scores_of(found)


def scores_of(found: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's results as flat scores."""
    scores: dict[str, Any] = {}
    for task, values in found["results"].items():
        size = found.get("n-samples", {}).get(task, {}).get("effective")
        scores.update({f"{task}/n": size} if size is not None else {})
        for key, value in values.items():
            name, _, chosen = key.partition(",")
            if not isinstance(value, (int, float)) or name.endswith("_stderr") or not chosen:
                continue
            label = f"{task}/{name}" if chosen == "none" else f"{task}/{name}/{chosen}"
            error = values.get(f"{name}_stderr,{chosen}")
            scores[label] = float(value)
            known = isinstance(error, (int, float)) and error == error
            scores[f"{label}_interval"] = [value - 1.96 * error, value + 1.96 * error] if known else None
    return scores
