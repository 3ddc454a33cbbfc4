"""A target model for the tuner: a scikit-learn classifier of reviews, trained on the rows, tested on validation rows.

Needs scikit-learn, which is optional (pip install scikit-learn):

    python -m synth.tune --config synth/tuning/examples/reviews.yaml
"""

from typing import Any

from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline


def accuracy(rows: list[dict[str, Any]], validation_dataset: list[dict[str, Any]]) -> dict[str, float]:
    """The accuracy on the validation rows of a word-count classifier trained on `rows`."""
    texts, labels = ([row[key] for row in rows] for key in ("input", "output"))
    tested, truths = ([row[key] for row in validation_dataset] for key in ("input", "output"))
    if len(set(labels)) == 1:
        return {"accuracy": truths.count(labels[0]) / len(truths)}
    classifier = make_pipeline(CountVectorizer(), LogisticRegression())
    classifier.fit(texts, labels)
    return {"accuracy": float(classifier.score(tested, truths))}
