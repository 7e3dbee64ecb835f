"""Suite ``robustness``: attacks keep to their box, scores are those of their definitions, and what is wrong is seen."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.bench.cli import main
from moebench.bench.run import planned
from moebench.contracts import MoebenchError, Registry
from moebench.results.query import run_sql
from moebench.suites.robust import answers, images, neurons
from moebench.suites.robust.attack import attacked, divergence
from moebench.suites.robust.digits import CORRUPTIONS, TEST, load_digits
from moebench.suites.robust.judged import calibration_error, exact_match, f1
from moebench.suites.robust.moe_cnn import MoeCnn
from moebench.suites.robust.questions import (
    KNOWN,
    NAMES,
    NEW_NAMES,
    SYNONYMS,
    UNSEEN,
    augmented,
    example,
    vocabulary,
)
from moebench.suites.robust.reader import Reader, SwitchFfn
from moebench.suites.robust.trial import RobustTrial

pytest.importorskip("sklearn")
REGISTRY = Registry.load()


def cases(*settings):
    return planned(["suite=robustness", *settings], REGISTRY)[0].cases


def facts_of(case):
    trial = RobustTrial(case)
    check = trial.verify(0, trial.run(0))
    assert check.ok, check
    return {metric.name: metric for metric in trial.facts().metrics}, trial.facts().items


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "truth", "exact", "score"),
    [
        ("the old bridge", "Old bridge.", 1.0, 1.0),
        ("bridge", "old bridge", 0.0, 2 / 3),
        ("old old bridge", "old bridge", 0.0, 0.8),
        ("mill", "old bridge", 0.0, 0.0),
        ("the", "a", 1.0, 1.0),
        ("", "mill", 0.0, 0.0),
    ],
)
def test_exact_match_and_f1_are_those_of_squad(answer, truth, exact, score):
    assert (exact_match(answer, truth), f1(answer, truth)) == pytest.approx((exact, score))


def test_calibration_error_by_hand():
    probs_BC = torch.tensor([[0.95, 0.05], [0.95, 0.05], [0.55, 0.45], [0.45, 0.55]])
    label_B = torch.tensor([0, 1, 0, 0])  # .95 twice: half right; .55 twice: half right
    assert calibration_error(probs_BC, label_B) == pytest.approx((2 * 0.45 + 2 * 0.05) / 4)
    assert calibration_error(torch.eye(2)[label_B], label_B) == 0


# --- images ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(epsilon=st.floats(0.01, 0.5), steps=st.integers(1, 4), seed=st.integers(0, 100))
def test_an_attack_stays_in_its_box_and_raises_the_loss(epsilon, steps, seed):
    torch.manual_seed(seed)
    image = torch.rand(3, 1, 8, 8)
    weight = torch.randn(1, 8, 8)
    found = attacked(image, lambda one: (one * weight).sum(), epsilon, steps, 2.5 * epsilon / steps)
    assert float((found - image).abs().max()) <= epsilon + 1e-6
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    assert float((found * weight).sum()) >= float((image * weight).sum())


def test_divergence_is_that_of_its_definition():
    logits, of = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    p, q = of.softmax(-1), logits.softmax(-1)
    assert float(divergence(logits, of)) == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)
    assert float(divergence(of, of)) == pytest.approx(0, abs=1e-6)


def test_the_network_is_that_of_its_chosen_banks_and_another_is_seen():
    torch.manual_seed(0)
    model, image = MoeCnn(), load_digits(0).test_B1YX[:16]
    assert images.check(model, image, image, 0.1).ok
    with torch.no_grad():
        broken = model.chosen_alone
        model.chosen_alone = lambda one: broken(one) + 0.01
    assert "not the one of its chosen banks" in images.check(model, image, image, 0.1).reason
    model.chosen_alone = broken
    assert "outside their box" in images.check(model, image, (image + 0.3).clamp(0, 1), 0.1).reason
    assert "outside their box" in images.check(model, image, image + 0.05, 0.1).reason  # brighter than 1


def test_advmoe_takes_turns_that_share_no_parameter():
    model = MoeCnn()
    (experts, _), (router, _) = images.TURNS["advmoe"](model, 0.1)
    assert not {id(one) for one in experts} & {id(one) for one in router}
    assert len(experts) + len(router) == len(list(model.parameters()))


def test_gradients_reach_the_router_through_the_choice():
    torch.manual_seed(0)
    model = MoeCnn()
    model(torch.rand(4, 1, 8, 8)).sum().backward()
    assert all(float(one.grad.abs().max()) > 0 for one in model.router.parameters())


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corrupted_images_stay_images_and_differ(name):
    image = load_digits(1).test_B1YX[:32]
    found = CORRUPTIONS[name](image, torch.Generator().manual_seed(0))
    assert found.shape == image.shape
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    assert not torch.equal(found, image)
    assert torch.equal(found, CORRUPTIONS[name](image, torch.Generator().manual_seed(0)))


# --- neurons ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [None, 16])
def test_only_the_largest_activations_pass_and_the_oracle_agrees(kept):
    torch.manual_seed(0)
    model, image_BI = neurons.LazyMlp(kept), torch.rand(5, 64)
    hidden_BF = model.hidden(image_BI)
    assert int((hidden_BF != 0).sum(1).max()) <= (kept or neurons.WIDTH)
    torch.testing.assert_close(model(image_BI).double(), model.oracle(image_BI), rtol=1e-5, atol=1e-5)


def test_a_network_that_passes_others_than_the_largest_is_caught(monkeypatch):
    torch.manual_seed(0)
    digits, model = load_digits(0), neurons.LazyMlp(16)
    assert neurons.judged(model, digits, 0).check.ok
    true = neurons.LazyMlp.hidden
    monkeypatch.setattr(neurons.LazyMlp, "hidden", lambda self, image: true(self, image) * (torch.arange(512) % 2))
    assert not neurons.judged(model, digits, 0).check.ok


def test_so_many_labels_are_wrong_as_was_asked():
    label_B = load_digits(0).train_label_B
    moved = neurons.wrong_labels(label_B, 0.3, 0)
    assert int((moved != label_B).sum()) == round(0.3 * len(label_B))
    assert torch.equal(moved, neurons.wrong_labels(label_B, 0.3, 0))
    assert torch.equal(neurons.wrong_labels(label_B, 0.0, 0), label_B)


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("templates", "names"), [(KNOWN, NAMES), (UNSEEN, NEW_NAMES)])
def test_a_question_has_its_answer_in_the_sentence_of_the_person_it_asks_for(templates, names):
    rng, words = random.Random(0), vocabulary()
    for _ in range(50):
        one = example(rng, templates, names)
        text, answer = " ".join(one.words), one.answer
        question, _, context = text.partition("?")
        (who,) = {word for word in question.split() if word in names}
        (sentence,) = [part for part in context.split(" .") if answer in part]
        assert who in sentence.split()
        assert set(one.words) <= words.keys()


def test_augmentation_teaches_no_word_of_unseen_sentences():
    known, unseen = (
        {word for texts in told.values() for text in texts for word in text.split()} for told in (KNOWN, UNSEEN)
    )
    assert not {word for group in SYNONYMS for word in group} & (unseen - known)


def test_augmentation_keeps_question_and_answer_and_changes_the_context():
    rng, changes, words, changed = random.Random(0), random.Random(1), vocabulary(), 0
    for _ in range(50):
        one = example(rng, KNOWN, NAMES)
        other = augmented(changes, one)
        assert other.answer == one.answer
        question = one.words.index("?") + 1
        assert other.words[:question] == one.words[:question]
        assert set(other.words) <= words.keys()
        changed += other.words != one.words
    assert changed > 45


def test_a_switch_layer_is_the_chosen_expert_times_its_probability_and_one_expert_is_dense():
    torch.manual_seed(0)
    ffn, x_NH = SwitchFfn(4), torch.randn(9, 64)
    probs_NE = ffn.router(x_NH).softmax(-1)
    for token in range(9):
        expert = int(probs_NE[token].argmax())
        wanted = ffn.down_EHF[expert] @ (ffn.up_EFH[expert] @ x_NH[token]).relu() * probs_NE[token, expert]
        torch.testing.assert_close(ffn(x_NH)[token], wanted, rtol=1e-5, atol=1e-5)
    dense = SwitchFfn(1)
    torch.testing.assert_close(dense(x_NH), (x_NH @ dense.up_EFH[0].T).relu() @ dense.down_EHF[0].T)


def test_spans_are_the_likeliest_of_at_most_four_words():
    logits_B2T = torch.full((2, 2, 12), -5.0)
    logits_B2T[0, 0, 3], logits_B2T[0, 1, 5] = 5.0, 5.0
    logits_B2T[1, 0, 1], logits_B2T[1, 1, 9], logits_B2T[1, 1, 2] = 5.0, 6.0, 4.0  # 1..9 is too long
    assert answers.spans(logits_B2T) == [(3, 5), (1, 2)]


def test_a_reader_that_sees_what_fills_a_batch_up_is_caught():
    torch.manual_seed(0)
    words = vocabulary()
    model = Reader(len(words) + 1, 4, words["?"]).eval()
    batch = [example(random.Random(seed), KNOWN, NAMES) for seed in range(4)]
    with torch.no_grad():
        right = model(answers.numbered(batch, words))
        assert answers.check(model, batch, words, right).ok
        assert not answers.check(model, batch, words, right + 0.1 * torch.randn_like(right)).ok
        assert not answers.check(model, batch, words, right * float("nan")).ok


def test_a_switch_layer_without_its_probability_is_caught(monkeypatch):
    torch.manual_seed(0)
    words = vocabulary()
    model = Reader(len(words) + 1, 4, words["?"]).eval()
    batch = [example(random.Random(seed), KNOWN, NAMES) for seed in range(4)]
    true = SwitchFfn.forward
    monkeypatch.setattr(SwitchFfn, "forward", lambda self, x_NH: 2 * true(self, x_NH))
    with torch.no_grad():
        found = answers.check(model, batch, words, model(answers.numbered(batch, words)))
    assert "not the chosen expert times its probability" in found.reason


# --- the suite -------------------------------------------------------------------------------------------------------


def test_every_task_and_method_is_a_case_and_knobs_of_others_change_no_key():
    found = {(case.workload["task"], case.workload["method"]): case.case_key for case in cases()}
    assert len(found) == 9
    other = {(c.workload["task"], c.workload["method"]): c.case_key for c in cases("suite.epsilon=0.2")}
    assert {key for key in found if found[key] != other[key]} == {key for key in found if key[0] == "images"}


@pytest.mark.parametrize("case", cases("suite.steps=3"), ids=lambda case: "-".join(list(case.workload.values())[:2]))
def test_a_few_steps_of_training_are_judged_the_same_twice(case):
    metrics, items = facts_of(case)
    again, _ = facts_of(case)
    assert {name: metric.value for name, metric in metrics.items()} == {n: m.value for n, m in again.items()}
    assert all(metric.lo is None or metric.lo <= metric.value <= metric.hi for metric in metrics.values())
    judged = TEST if case.workload["task"] != "answers" else answers.JUDGED
    assert len({item.item for item in items}) == judged
    other, _ = facts_of(replace(case, seed=1))
    assert {n: m.value for n, m in other.items()} != {n: m.value for n, m in metrics.items()}


def test_numbers_that_are_none_are_wrong():
    case = cases("suite.task=neurons", "suite.method=dense", "suite.steps=1")[0]
    trial = RobustTrial(case)
    output = trial.run(0)
    broken = replace(output, metrics=[replace(output.metrics[0], value=float("nan"))])
    assert "is no number" in trial.verify(0, broken).reason


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("suite.task=imges", "did you mean 'images'"),
        ("suite.method=advme", "did you mean 'advmoe'"),
        ("suite.epsilon=2", "between 0 and 1"),
        ("suite.steps=0", "at least 1"),
    ],
)
def test_mistakes_are_one_sentence(setting, told):
    with pytest.raises(MoebenchError, match=told):
        cases(setting)


def test_a_run_keeps_metrics_and_items(tmp_path, capsys):
    status = main(["run", "suite=robustness", "suite.task=neurons", "suite.steps=2", f"store={tmp_path}"])
    assert status == 0, capsys.readouterr()
    rows = run_sql(tmp_path, "SELECT count(*) FROM metrics WHERE name = 'calibration_error'", format="csv")
    assert rows.split() == ["count_star()", "2"]
    items = run_sql(tmp_path, "SELECT count(*) AS n FROM items", format="csv")
    assert items.split() == ["n", str(2 * TEST)]
