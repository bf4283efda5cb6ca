"""Our models in lm-evaluation-harness, with tasks and data of our own."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from slm_jax.errors import UserError
from slm_jax.evaluate import Item, Subject, perplexity, score_items
from slm_jax.evaluate.questions import generate_until
from tests.evaluate.tiny import EOS, log_p, of_pair, subject

QUESTIONS = [
    {"query": f"{a}+{b}=", "choices": [str(a + b), str(a + b + 1), "no"], "gold": a % 3}
    for a, b in ((1, 2), (3, 4), (5, 1), (2, 2))
]
TEXTS = ["def f(x):\n    return x\n", "naïve text", "a long text " * 30]


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class, over the harness if it is installed, else over the interface it documents."""
    if find_spec("lm_eval") is None:
        api = ModuleType("lm_eval.api.model")
        api.LM = type("LM", (), {})  # type: ignore[attr-defined]
        for name, module in (("lm_eval", ModuleType("lm_eval")), ("lm_eval.api.model", api)):
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setitem(sys.modules, "lm_eval.api", ModuleType("lm_eval.api"))
    monkeypatch.delitem(sys.modules, "slm_jax.evaluate.harness", raising=False)
    from slm_jax.evaluate.harness import HarnessModel

    return HarnessModel(subject())


def asked(*args: Any) -> Any:
    """A request as the harness makes it."""
    return SimpleNamespace(args=args)


def test_requests_are_answered(adapter: Any) -> None:
    pairs = [("1+2=", "3"), ("", "text"), ("space ", "word")]
    want = [([*b"1+2="], [*b"3"]), ([EOS], [*b"text"]), ([*b"space"], [*b" word"])]
    found = adapter.loglikelihood([asked(*pair) for pair in pairs])
    for (log, greedy), (context, continuation) in zip(found, want, strict=True):
        assert log == pytest.approx(of_pair(context, continuation), rel=1e-5)
        assert greedy in (True, False)

    rolled = adapter.loglikelihood_rolling([asked(TEXTS[1]), asked("")])
    assert rolled == [pytest.approx(log_p([EOS, *TEXTS[1].encode()]).sum(), rel=1e-5), 0.0]

    settings = {"until": ["\n"], "max_gen_toks": 3, "do_sample": False}
    texts = adapter.generate_until([asked("ab", settings), asked("cd", settings)])
    assert all(isinstance(text, str) and "\n" not in text for text in texts)
    with pytest.raises(UserError, match="answers are greedy"):
        adapter.generate_until([asked("ab", {"temperature": 0.5})])


TASKS = {
    "local_choice": """
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_target: gold
doc_to_choice: choices
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "local_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{query}}"
metric_list: [{metric: bits_per_byte}]
""",
    "local_answer": """
output_type: generate_until
doc_to_text: "{{query}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 3}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.mark.slow
def test_the_harness_runs_local_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is installed apart: pip install it")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    from lm_eval.tasks import TaskManager

    from slm_jax.evaluate.harness import HarnessModel

    right = generate_until(subject(), [q["query"] for q in QUESTIONS], max_new_tokens=3)
    answers = [
        {"query": q["query"], "choices": [text]} for q, text in zip(QUESTIONS, right, strict=True)
    ]
    answers[0]["choices"] = ["wrong"]
    data = {
        "local_choice": QUESTIONS,
        "local_text": [{"query": text} for text in TEXTS],
        "local_answer": answers,
    }
    for name, task in TASKS.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in data[name]))
        head = f"task: {name}\ndataset_path: json\ntest_split: test\n"
        head += f"dataset_kwargs: {{data_files: {{test: {file}}}}}\nmetadata: {{version: 1.0}}"
        (tmp_path / f"{name}.yaml").write_text(head + task)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(
        HarnessModel(subject()), tasks=list(TASKS), task_manager=manager, bootstrap_iters=0
    )["results"]
    items = [Item("choice", (q["query"],), tuple(q["choices"]), q["gold"]) for q in QUESTIONS]
    ours = score_items(subject(), items, delimiter="").metrics
    assert found["local_choice"]["acc,none"] == ours["acc"]
    assert found["local_choice"]["acc_norm,none"] == ours["acc_norm"]
    start = Subject(subject().model, subject().tokenizer, np.array([EOS], np.int32))
    bits = perplexity(start, TEXTS).bits_per_byte
    assert found["local_text"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)
    assert found["local_answer"]["exact_match,none"] == 0.75
