"""Compiled operations; each public name has a plain-NumPy twin in looplm_reference.ops."""

from .adamw import adamw_update, gradient_norm
from .attention import attention_backward, attention_forward
from .cross_entropy import cross_entropy_backward, cross_entropy_forward
from .embedding import embedding_backward, embedding_forward
from .exit_distribution import exit_distribution_backward, exit_distribution_forward, exit_loop
from .exit_statistics import prediction_kl, relative_change, stable_loops, top_margin, top_probability
from .gate import gate_backward, gate_forward
from .linear import linear_backward, linear_forward
from .objective import continue_target, stage1_backward, stage1_forward, stage2_backward, stage2_forward
from .rmsnorm import (
    rmsnorm_backward,
    rmsnorm_forward,
    rmsnorm_residual_backward,
    rmsnorm_residual_forward,
)
from .rope import rope_backward, rope_forward
from .swiglu import swiglu_backward, swiglu_forward

__all__ = [
    "adamw_update",
    "attention_backward",
    "attention_forward",
    "continue_target",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "embedding_backward",
    "embedding_forward",
    "exit_distribution_backward",
    "exit_distribution_forward",
    "exit_loop",
    "gate_backward",
    "gate_forward",
    "gradient_norm",
    "linear_backward",
    "linear_forward",
    "prediction_kl",
    "relative_change",
    "rmsnorm_backward",
    "rmsnorm_forward",
    "rmsnorm_residual_backward",
    "rmsnorm_residual_forward",
    "rope_backward",
    "rope_forward",
    "stable_loops",
    "stage1_backward",
    "stage1_forward",
    "stage2_backward",
    "stage2_forward",
    "swiglu_backward",
    "swiglu_forward",
    "top_margin",
    "top_probability",
]
