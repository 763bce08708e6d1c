"""`OneVsRestSVC`: a support vector machine per class, whose margins a temperature calibrates."""

import numpy as np
from jaxtyping import Float, Shaped
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.svm import SVC
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted


class OneVsRestSVC(ClassifierMixin, BaseEstimator):
    """Support vector machines on a precomputed kernel, one of each class against the rest.

    ``SVC`` lets classifiers of pairs vote, and votes say little of how sure they are; here the
    decision of each class is its margin.

    Args:
        C: what a row on the wrong side costs.

    Attributes:
        classes_: labels, sorted.
        coef_: of each training row in the decision of each class ``[classes, rows]``; of two
            classes, of the second alone.
        intercept_: of each decision.

    Example:
        >>> x = np.arange(6.0)[:, None]
        >>> OneVsRestSVC().fit(x @ x.T, x[:, 0] // 2).predict(x @ x.T)
        array([0., 0., 1., 2., 2., 2.])
    """

    def __init__(self, *, C: float = 1.0) -> None:
        self.C = C

    def fit(
        self, X: Float[np.ndarray, "rows rows"], y: Shaped[np.ndarray, " rows"]
    ) -> "OneVsRestSVC":
        """Fit each class's machine.

        Args:
            X: kernel of the training rows.
            y: their labels.

        Raises:
            ValueError: there is a single class, or C is not above 0.
        """
        self.classes_ = np.unique(y)
        one_side = self.classes_[1:] if len(self.classes_) == 2 else self.classes_
        self.coef_ = np.zeros((len(one_side), len(X)))
        self.intercept_ = np.zeros(len(one_side))
        for k, label in enumerate(one_side):
            machine = SVC(kernel="precomputed", C=self.C).fit(X, y == label)
            self.coef_[k, machine.support_] = machine.dual_coef_[0]
            self.intercept_[k] = machine.intercept_[0]
        return self

    def decision_function(self, X: Float[np.ndarray, "rows training"]) -> Float[np.ndarray, "..."]:
        """Margin of each class ``[rows, classes]``; of two, of the second ``[rows]``.

        Args:
            X: kernel of new rows with each training row.
        """
        check_is_fitted(self)
        found = np.asarray(X, np.float64) @ self.coef_.T + self.intercept_
        return found[:, 0] if len(self.classes_) == 2 else found

    def predict(self, X: Float[np.ndarray, "rows training"]) -> Shaped[np.ndarray, " rows"]:
        """The class of the largest margin."""
        found = self.decision_function(X)
        return self.classes_[(found > 0).astype(int) if found.ndim == 1 else found.argmax(axis=1)]

    def __sklearn_tags__(self) -> Tags:
        """Tell scikit-learn that columns are training rows."""
        tags = super().__sklearn_tags__()
        tags.input_tags.pairwise = True
        return tags
