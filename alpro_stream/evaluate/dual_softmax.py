"""Dual softmax over queries and candidates. Legend: Q queries, N candidates."""

from torch import Tensor


def dual_softmax(logits_QN: Tensor) -> Tensor:
    """Log of the probability of a candidate for a query times that of the query for the candidate.

    A candidate that suits every query is worth less for each. From CAMoE (Cheng et al. 2021), as QB-Norm (Bogolin et
    al., CVPR 2022) after it: **it needs all queries of the test set at once**, so its figures do not compare with those
    of systems that see one query at a time.

    CAMoE multiplies the similarity itself by the second factor, which turns the order around where similarities are
    negative, as log-odds of VTM are; here both factors are probabilities.

    Args:
        logits_QN: similarities over the temperature, or log-odds.
    """
    return logits_QN.log_softmax(dim=1) + logits_QN.log_softmax(dim=0)
