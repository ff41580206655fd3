"""Which labels are in doubt: the numbers by hand, and exchanged labels that are found before the network's mistakes."""

import csv
import io

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from cifar.explain import label_quality, mistakes
from cifar.explain.findings import ExplainedImages, Findings, Float, Int64, Neighbours, UInt8
from cifar.explain.layers import Grid

EXCHANGED = 0.02  # of the labels


def findings(
    probabilities: Float, labels: UInt8, nearest: UInt8 | None = None, wrong_in: dict[str, np.ndarray] | None = None
) -> Findings:
    """Of the arrays that matter here; `nearest` [n, v] are labels of training images."""
    wrong, nothing = mistakes.find(probabilities, labels), np.zeros(0, np.float32)
    count, classes = len(wrong), probabilities.shape[1]
    pictures = np.zeros((count, 32, 32, 3), np.uint8)
    shown = ExplainedImages(wrong, pictures, [], np.zeros((count, 2), np.uint8), np.zeros((count, 2, 8, 8), np.float32),
                            np.zeros((count, 2), np.float32), np.zeros((count, 4, 4), np.float32), nothing,
                            np.zeros(count, np.float32), Grid(8, 2, 4), Grid(4, 4, 8))  # fmt: skip
    none = np.zeros((count, 0))
    neighbours = nearest if nearest is None else Neighbours(none, none, none, nearest[wrong], none, none[0:0], 1.0)
    history = np.zeros((0, len(labels)), np.uint8)
    return Findings({}, [str(name) for name in range(classes)], labels, probabilities, np.zeros(0, np.int64), history,
                    shown, shown, np.full(count, -1), "", "", neighbours, wrong_in or {})  # fmt: skip


def exchanged(labels: np.ndarray, classes: int, generator: np.random.Generator) -> tuple[UInt8, Int64]:
    """The labels, of which EXCHANGED are random others now, and their positions."""
    positions = generator.choice(len(labels), round(EXCHANGED * len(labels)), replace=False)
    planted = labels.astype(np.int64)
    planted[positions] = (planted[positions] + generator.integers(1, classes, len(positions))) % classes
    return planted.astype(np.uint8), positions


def found_by_doubt(shown: Findings, planted: Int64) -> float:
    """The part of the exchanged labels among as many mistakes whose labels are most in doubt."""
    order = np.argsort(-label_quality.measure(shown).doubt, kind="stable")[: len(planted)]
    return float(np.isin(shown.mistakes.indices[order], planted).mean())


def found_by_confidence(shown: Findings, planted: Int64) -> float:
    """The same of the mistakes that the network is most confident of, which are its first."""
    return float(np.isin(shown.mistakes.indices[: len(planted)], planted).mean())


def found_by_self_confidence(shown: Findings, planted: Int64) -> float:
    """The same of the images whose labels have the smallest probabilities."""
    own = shown.probabilities[np.arange(len(shown.labels)), shown.labels]
    return float(np.isin(np.argsort(own, kind="stable")[: len(planted)], planted).mean())


PROBABILITIES = np.array([[0.9, 0.1, 0], [0.7, 0.3, 0], [0.95, 0.05, 0], [0.4, 0.6, 0], [0.45, 0.4, 0.15]], np.float32)
LABELS = np.array([0, 0, 1, 1, 1], np.uint8)


def test_a_class_threshold_is_the_mean_probability_of_images_labelled_so() -> None:
    usual = label_quality.thresholds(PROBABILITIES, LABELS)
    np.testing.assert_allclose(usual, [0.8, 0.35, 0], rtol=1e-6)  # no image is labelled 2
    expected = [0, 0.1 / 0.8, 0.3 / 0.35, 0, 0]
    np.testing.assert_allclose(label_quality.shortfall(PROBABILITIES, LABELS), expected, atol=1e-6)


def test_doubt_is_the_mean_of_what_there_is() -> None:
    nearest = np.array([[0, 0], [0, 0], [0, 1], [1, 1], [0, 1]], np.uint8)
    others = {"a": np.array([0, 0, 1, 0, 1], bool), "b": np.array([0, 1, 1, 0, 0], bool)}
    assert label_quality.measure(findings(PROBABILITIES, LABELS)).doubt == pytest.approx([0.3 / 0.35, 0], abs=1e-4)
    all_three = label_quality.measure(findings(PROBABILITIES, LABELS, nearest, others))
    assert {name: part.tolist() for name, part in all_three.parts.items()} == {
        "network": pytest.approx([0.3 / 0.35, 0]), "neighbours": [0.5, 0.5], "runs": [1, 0.5],
    }  # fmt: skip
    assert all_three.doubt == pytest.approx([(0.3 / 0.35 + 1.5) / 3, 1 / 3], abs=1e-4)


def test_ranks_begin_with_the_greatest_doubt_and_end_where_labels_are_no_longer_in_doubt() -> None:
    doubt = np.array([0.95, 0.3, 1.0, 0.9, 0.95, 0.8999], np.float32)
    assert label_quality.rank(doubt).tolist() == [2, 0, 1, 4, 3, 0]
    assert label_quality.rank(doubt[:0]).tolist() == []


def test_no_label_that_every_image_of_its_class_agrees_with_is_in_doubt() -> None:
    certain = np.eye(3, dtype=np.float32)[[0, 1, 2, 2]]
    measured = label_quality.measure(findings(certain, np.array([0, 1, 2, 2], np.uint8)))
    assert measured.rank.tolist() == []
    assert label_quality.measure(findings(certain, np.array([0, 1, 2, 1], np.uint8))).rank.tolist() == [1]


def test_the_list_has_the_ranks_of_labels_in_doubt_alone() -> None:
    probabilities = np.array([[0.98, 0.02], [0.9, 0.1], [0.02, 0.98], [0.6, 0.4], [0.01, 0.99]], np.float32)
    labels = np.array([0, 0, 1, 1, 0], np.uint8)
    lines = list(csv.DictReader(io.StringIO(mistakes.table(findings(probabilities, labels)).decode())))
    assert [(line["index"], line["doubt_rank"]) for line in lines] == [("4", "1"), ("3", "")]


@pytest.mark.parametrize("seed", range(5))
def test_a_threshold_for_each_class_keeps_a_hard_class_from_hiding_exchanged_labels(seed: int) -> None:
    """Images of class 0 get little of it: its labels are the least probable ones, and are as they should be."""
    generator = np.random.default_rng(seed)
    true = generator.integers(0, 5, 2000)
    logits = generator.normal(0, 1, (2000, 5))
    logits[np.arange(2000), true] += np.where(true == 0, 0.3, 5)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels, planted = exchanged(true, 5, generator)
    shown = findings(probabilities.astype(np.float32), labels)
    assert found_by_doubt(shown, planted) > found_by_self_confidence(shown, planted)


def test_exchanged_labels_of_digits_are_found_before_mistakes_better_than_by_confidence() -> None:
    """Of real digits, with noise that makes a seventh of them mistakes; the mean of five exchanges."""
    images, true = load_digits(return_X_y=True)
    generator = np.random.default_rng(0)
    noisy, training = images / 16 + generator.normal(0, 0.25, images.shape), generator.permutation(len(true))[:1000]
    test = np.setdiff1d(np.arange(len(true)), training)
    model = LogisticRegression(C=0.1).fit(noisy[training], true[training])
    probabilities = model.predict_proba(noisy[test]).astype(np.float32)
    rows = KNeighborsClassifier(10).fit(noisy[training], true[training]).kneighbors(noisy[test], return_distance=False)
    nearest = true[training][rows].astype(np.uint8)

    found = []
    for seed in range(5):
        labels, planted = exchanged(true[test], 10, np.random.default_rng(seed))
        alone, together = findings(probabilities, labels), findings(probabilities, labels, nearest)
        found.append([
            found_by_confidence(alone, planted), found_by_self_confidence(alone, planted),
            found_by_doubt(alone, planted), found_by_doubt(together, planted),
        ])  # fmt: skip
    confidence, self_confidence, doubt, with_neighbours = np.mean(found, axis=0)
    assert confidence < doubt
    assert max(confidence, self_confidence) < with_neighbours
    # With the network alone there is no such claim: it is as good as the label's own probability.
    assert doubt == pytest.approx(self_confidence, abs=0.1)
