"""The kinds of RoPE that Hugging Face configurations name: frequencies and attention factor of each.

The formulas are those of transformers 5.23.0, `modeling_rope_utils.ROPE_INIT_FUNCTIONS`, evaluated in float64.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def number(parameters: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A positive number of the dict; None counts as missing."""
    value = parameters.get(name)
    value = default if value is None else value
    if value is None:
        raise ValueError(
            f"{name} must be in rope_parameters or given beside it, got neither. Take it from the configuration; "
            "transformers' classes hold defaults for what a configuration leaves out."
        )
    rule = f"{name} must be a finite number > 0"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{rule}, got {value!r:.80}. Take it from the configuration.")
    found = float(value)
    if not (math.isfinite(found) and found > 0):
        raise ValueError(f"{rule}, got {value}. Take it from the configuration.")
    return found


def _default(parameters: dict[str, Any], rotary_dim: int, sequence_length: int | None) -> tuple[np.ndarray, float]:
    return _geometric(number(parameters, "rope_theta"), rotary_dim), 1.0


def _linear(parameters: dict[str, Any], rotary_dim: int, sequence_length: int | None) -> tuple[np.ndarray, float]:
    return _geometric(number(parameters, "rope_theta"), rotary_dim) / number(parameters, "factor"), 1.0


def _proportional(parameters: dict[str, Any], head_dim: int, sequence_length: int | None) -> tuple[np.ndarray, float]:
    """The first int(partial_rotary_factor * head_dim) // 2 frequencies of the whole head, and 0 for the rest."""
    inv_freq = _geometric(number(parameters, "rope_theta"), head_dim) / number(parameters, "factor", 1.0)
    return np.where(np.arange(head_dim // 2) < parameters["rotary_dim"] // 2, inv_freq, 0.0), 1.0


def _dynamic(parameters: dict[str, Any], rotary_dim: int, sequence_length: int | None) -> tuple[np.ndarray, float]:
    if rotary_dim < 4:
        raise ValueError(f"rope_type 'dynamic' needs a rotary_dim of at least 4, got {rotary_dim}. Use 'default'.")
    if parameters.get("alpha"):
        stretch = number(parameters, "alpha")
    else:
        trained = number(parameters, "max_position_embeddings")
        factor = number(parameters, "factor")
        length = max(_needed_length("dynamic", sequence_length), trained)
        stretch = factor * length / trained - (factor - 1)
    return _geometric(number(parameters, "rope_theta") * stretch ** (rotary_dim / (rotary_dim - 2)), rotary_dim), 1.0


def _yarn(parameters: dict[str, Any], rotary_dim: int, sequence_length: int | None) -> tuple[np.ndarray, float]:
    theta = number(parameters, "rope_theta")
    trained = _trained_length(parameters)
    factor = _extension(parameters)
    if parameters.get("attention_factor") is not None:
        attention_factor = number(parameters, "attention_factor")
    elif parameters.get("mscale") and parameters.get("mscale_all_dim"):
        attention_factor = _mscale(factor, number(parameters, "mscale"))
        attention_factor /= _mscale(factor, number(parameters, "mscale_all_dim"))
    else:
        attention_factor = _mscale(factor, 1.0)

    def frequency_turning(name: str, default: float) -> float:
        """Index, not whole, of the frequency that makes this many turns over the trained length."""
        turns = number(parameters, name, default) if parameters.get(name) else default
        return rotary_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    if theta <= 1:
        raise ValueError(f"rope_theta must be > 1 for rope_type 'yarn', got {theta}. Take it from the configuration.")
    first, last = frequency_turning("beta_fast", 32.0), frequency_turning("beta_slow", 1.0)
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)  # sic: the last frequency is rotary_dim // 2 - 1
    last = last if first != last else last + 0.001
    slowed = np.clip((np.arange(rotary_dim // 2) - first) / (last - first), 0, 1)
    inv_freq = _geometric(theta, rotary_dim)
    return inv_freq / factor * slowed + inv_freq * (1 - slowed), attention_factor


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(parameters: dict[str, Any], rotary_dim: int, sequence_length: int | None) -> tuple[np.ndarray, float]:
    trained = _trained_length(parameters)
    which = "long" if _needed_length("longrope", sequence_length) > trained else "short"
    divisors = parameters.get(f"{which}_factor")
    rule = f"{which}_factor must be a list of rotary_dim // 2 = {rotary_dim // 2} numbers > 0"
    remedy = "Check head_dim and partial_rotary_factor against the configuration."
    if not isinstance(divisors, list | tuple | np.ndarray):
        raise TypeError(f"{rule}, got {divisors!r:.80}. {remedy}")
    if len(divisors) != rotary_dim // 2:
        raise ValueError(f"{rule}, got {len(divisors)}. {remedy}")
    listed = {f"{which}_factor[{i}]": divisor for i, divisor in enumerate(divisors)}
    inv_freq = _geometric(number(parameters, "rope_theta"), rotary_dim) / [number(listed, name) for name in listed]

    for name in (f"{which}_mscale", "attention_factor"):
        if parameters.get(name) is not None:
            return inv_freq, number(parameters, name)
    factor = _extension(parameters)
    return inv_freq, 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))


def _llama3(parameters: dict[str, Any], rotary_dim: int, sequence_length: int | None) -> tuple[np.ndarray, float]:
    factor, trained = number(parameters, "factor"), _trained_length(parameters)
    low, high = number(parameters, "low_freq_factor"), number(parameters, "high_freq_factor")
    if low >= high:
        raise ValueError(
            f"high_freq_factor must be greater than low_freq_factor, got {high} and {low}. "
            "Take both from the configuration."
        )
    inv_freq = _geometric(number(parameters, "rope_theta"), rotary_dim)
    turns = trained * inv_freq / (2 * math.pi)  # over the trained length
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return inv_freq / factor * (1 - kept) + inv_freq * kept, 1.0


def _geometric(theta: float, rotary_dim: int) -> np.ndarray:
    return theta ** -(np.arange(0, rotary_dim, 2) / rotary_dim)


def _trained_length(parameters: dict[str, Any]) -> float:
    """The length that the model was trained for before it was extended; transformers fills it in in the same way."""
    if parameters.get("original_max_position_embeddings") is None:
        return number(parameters, "max_position_embeddings")
    return number(parameters, "original_max_position_embeddings")


def _extension(parameters: dict[str, Any]) -> float:
    """`factor`, or else the ratio of the extended length to the trained one."""
    if parameters.get("factor") is None:
        return number(parameters, "max_position_embeddings") / _trained_length(parameters)
    return number(parameters, "factor")


def _needed_length(rope_type: str, sequence_length: int | None) -> int:
    if sequence_length is None:
        raise ValueError(
            f"rope_type {rope_type!r} needs sequence_length, got None. "
            "Pass the longest length, prompt and answer, that the table is for: it changes the frequencies."
        )
    return sequence_length


KINDS: dict[str, Callable[[dict[str, Any], int, int | None], tuple[np.ndarray, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
    "proportional": _proportional,
}

# Spellings of older checkpoints, as transformers' configurations of Qwen2-VL and Phi-3 read them.
ALIASES = {"mrope": "default", "su": "longrope"}
