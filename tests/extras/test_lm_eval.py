"""lm-eval on our models against lm-eval's own class for Transformers models, with tasks on generated files. Run by `make test-lm-eval`."""

import json

import pytest
import torch

pytest.importorskip("lm_eval", reason="make test-lm-eval")

import graftwork
import tiny
from graftwork.errors import UsageError
from graftwork.evaluation.harness import language_model, run_tasks, scores_of

CHOICE = """task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}} "
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WRITTEN = """task: tiny_written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}} "
doc_to_target: wanted
generation_kwargs: {{until: ["q"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
ROLLING = """task: tiny_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{{metric: bits_per_byte}}, {{metric: word_perplexity}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    words = ["one", "another", "the end", "in it", "this", "a note"]
    rows = [{"question": f"the user says {w}", "choices": [words[k - 1], words[k - 2], words[k - 3]], "answer": k % 3, "wanted": "x",
             "text": f"{w} and then {words[k - 1]} " * (3 + 40 * (k == 2))} for k, w in enumerate(words)]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choice", CHOICE), ("written", WRITTEN), ("rolling", ROLLING)):
        (folder / f"{name}.yaml").write_text(text.format(file=file))
    return folder


@pytest.fixture(scope="module")
def grafted():
    model = tiny.llama()
    graft = graftwork.attach(model, "lora", name="g", r=4)
    with torch.no_grad():
        for k, parameter in enumerate(graft.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(k)) * 0.3)
    return model, tiny.tokenizer()


def theirs(model, tokenizer, folder):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    answerer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=255)
    return scores_of(lm_eval.simple_evaluate(model=answerer, tasks=["tiny_choice", "tiny_written", "tiny_rolling"], bootstrap_iters=1000,
                                             task_manager=TaskManager(include_path=str(folder), include_defaults=False), log_samples=False))


def test_equals_lm_eval_s_own_class(grafted, tasks):
    """The bare base and the graft: our routing against a plain model and one with the change merged."""
    model, tokenizer = grafted
    names = ["tiny_choice", "tiny_written", "tiny_rolling"]
    plain = run_tasks(model, tokenizer, names, include_path=tasks, routed=True)
    changed = run_tasks(model, tokenizer, names, include_path=tasks, routed=True, adapter="g", batch_size=3)
    wanted = theirs(tiny.llama(), tokenizer, tasks)
    assert set(plain) == set(wanted)
    assert {"tiny_choice/acc", "tiny_choice/acc_norm", "tiny_written/exact_match", "tiny_choice/n"} <= set(plain)
    for key in wanted:
        if "interval" not in key and "/n" not in key:
            assert plain[key] == pytest.approx(wanted[key], rel=1e-4), key
    merged = tiny.llama()
    with torch.no_grad():
        for site, delta in model.graft_state.grafts["g"].delta_weights().items():
            merged.get_submodule(site).weight.add_(delta)
    wanted = theirs(merged, tokenizer, tasks)
    for key in wanted:
        if "interval" not in key and "/n" not in key:
            assert changed[key] == pytest.approx(wanted[key], rel=1e-3), key
    assert changed["tiny_rolling/bits_per_byte"] != pytest.approx(plain["tiny_rolling/bits_per_byte"], rel=1e-3)
    low, high = plain["tiny_choice/acc_interval"]
    assert low <= plain["tiny_choice/acc"] <= high


def test_requests_against_plain_forwards(grafted):
    """One log-likelihood, whether it is the greedy one, one answer cut at its stop text."""
    from lm_eval.api.instance import Instance

    model, tokenizer = grafted
    answerer = language_model(model, tokenizer, routed=True)

    def asked(kind, *arguments):
        return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)

    (value, greedy), = answerer.loglikelihood([asked("loglikelihood", "the user", " says one")])
    context, both = tokenizer("the user")["input_ids"], tokenizer("the user says one")["input_ids"]
    with torch.no_grad(), graftwork.routing(model, [None]):
        logs = model(torch.tensor([both])).logits[0].double().log_softmax(-1)
    assert value == pytest.approx(sum(logs[t - 1, both[t]].item() for t in range(len(context), len(both))), rel=1e-5)
    assert greedy == all(logs[t - 1].argmax() == both[t] for t in range(len(context), len(both)))
    answer, = answerer.generate_until([asked("generate_until", "the user ", {"until": [], "max_gen_toks": 8, "do_sample": False})])
    cut, = answerer.generate_until([asked("generate_until", "the user ", {"until": [answer[3:5]], "max_gen_toks": 8})])
    assert cut == answer[:answer.find(answer[3:5])]


def test_the_verb_and_its_errors(tasks, tmp_path, capsys):
    from graftwork.cli.main import main

    tiny.save(tiny.llama(), tmp_path / "model")
    asked = ["eval", str(tmp_path / "model"), "--lm-eval", "tiny_choice", "--lm-eval-path", str(tasks), "--limit", "4", "--json", "--quiet"]
    main(asked)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"]
    assert found["tiny_choice/n"] == 4 and 0 <= found["tiny_choice/acc"] <= 1
    with pytest.raises(SystemExit) as leave:
        main([*asked, "--data", "x.jsonl"])
    assert leave.value.code == 2 and "brings its own data" in capsys.readouterr().err
    with pytest.raises(UsageError, match="did you mean 'tiny_choice'"):
        run_tasks(tiny.llama(), tiny.tokenizer(), ["tiny_choise"], include_path=tasks)
    with pytest.raises(UsageError, match="no graft is named"):
        run_tasks(tiny.llama(), tiny.tokenizer(), ["tiny_choice"], include_path=tasks, adapter="g", routed=True)
