"""The error model and the certificate as C++ functions, with the constants that go with them."""

from __future__ import annotations

from .. import worst_case
from ..layout import ArenaLayout
from ..precision import print_cpp_function, print_cpp_vector_function
from .constants import CERTIFIED, certified_constants, policy_constants, print_cpp


def policy_formulas(key_dim: int, value_dim: int, element_size: int) -> str:
    """What the aligned read evaluates (precision.py), for caches of ``element_size`` bytes per number."""
    predicted = ("plane_K", "plane_V", "row_K", "row_V", "rows_K", "rows_K8", "rows_V", "rows_V4", "rows_V8")
    return "\n".join(
        [
            print_cpp(policy_constants(ArenaLayout(1, 1, key_dim, value_dim), element_size)),
            print_cpp_function("error_budget", "budget", ("alpha", "R", "u")),
            print_cpp_function("skip_threshold", "skip_threshold", ("B", "N", "P_v", "n", "theta_4")),
            print_cpp_function("addend_sum", "addend_sum", ("P_sK", "P_sKv", "P_sV", "R", "q"), {"D": value_dim}),
            print_cpp_function("threshold", "threshold", ("B", "E", "N")),
            print_cpp_function("remaining_budget", "remaining_budget", ("B", "left")),
            print_cpp_vector_function("weight_error_factor", "weight_error_factor", ("x",)),
            print_cpp_function("key_coefficient_4", "key_coefficient", ("q",), {"b": 4}),
            print_cpp_function("key_coefficient_8", "key_coefficient", ("q",), {"b": 8}),
            print_cpp_function("predicted_bytes", "predicted_bytes", predicted),
        ]
    )


def certified_formulas(key_dim: int, value_dim: int) -> str:
    """What the certified read evaluates (worst_case.py)."""

    def scalar(function: str, name: str, *arguments: str, **values: float) -> str:
        return print_cpp_function(function, name, arguments, values, worst_case.WORST_CASE)

    def vector(name: str, *arguments: str) -> str:
        return print_cpp_vector_function(name, name, arguments, worst_case.WORST_CASE)

    return "\n".join(
        [
            print_cpp({**CERTIFIED, **certified_constants(key_dim, value_dim)}),
            scalar("score_bound_4", "score_bound", "l_1", "q_1", "r_1", "s_K", b=4, D_K=key_dim),
            scalar("score_bound_8", "score_bound", "l_1", "q_1", "r_1", "s_K", b=8, D_K=key_dim),
            scalar("worst_case_budget", "worst_case_budget", "R", "alpha", "u"),
            scalar("certificate", "certificate", "A", "R", "V", "W", "W_v"),
            vector("skipped_value_bound", "m", "v"),
            vector("growth", "d"),
            vector("key_addend", "R", "g", "p", "v"),
            vector("weight_error_bound", "g", "p"),
            vector("weight_least", "d", "p"),
            vector("weight_slack", "x"),
        ]
    )
