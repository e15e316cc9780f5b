"""The command line: python -m benchmarks run | verify | demo."""

import argparse
import importlib.util
import os
import pathlib
import sys
from collections.abc import Sequence

from benchmarks import suites

# JAX and torch share the GPU here, so JAX must not reserve three quarters of it; read when JAX starts.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def heads(text: str) -> tuple[int, int]:
    """Query and key heads: "16/2" -> (16, 2)."""
    num_q_heads, _, num_kv_heads = text.partition("/")
    if not (num_q_heads.isdecimal() and num_kv_heads.isdecimal() and int(num_q_heads) and int(num_kv_heads)):
        raise argparse.ArgumentTypeError(f"heads are query/key counts such as 16/2, got {text}")
    return int(num_q_heads), int(num_kv_heads)


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text}")
    return int(text)


def parser(implementations: Sequence[str]) -> argparse.ArgumentParser:
    """`implementations` are the names that can be timed."""
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="time the implementations beside the oracle and the copy ceiling (GPU)")
    run.add_argument("--tokens", type=positive, nargs="+", metavar="T", default=list(suites.TOKENS))
    run.add_argument("--heads", type=heads, nargs="+", metavar="Hq/Hkv", default=list(suites.HEADS))
    run.add_argument("--head-dim", type=positive, default=256)
    run.add_argument("--rotary-dim", type=positive, default=64)
    run.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="bfloat16")
    run.add_argument("--op", choices=("forward", "backward"), default="forward", help="backward: gradients by jax.vjp")
    run.add_argument("--implementations", choices=implementations, nargs="+", default=list(implementations))
    run.add_argument("--repeats", type=positive, help="calls of each in a round; default: 40, down to 8 for long ones")
    run.add_argument("--rounds", type=positive, default=5)
    run.add_argument("--cache", choices=("hot", "cold"), default="hot", help="cold: L2 overwritten before each call")
    run.add_argument("--output", type=pathlib.Path, help="default: benchmarks/results/<gpu>.jsonl")
    run.add_argument("--commit", help="recorded as the commit; default: what git says here")
    commands.add_parser("verify", help="compare every implementation with the oracle over a sweep of cases")
    commands.add_parser("demo", help="a few Qwen3.5 shapes: agreement, time and GB/s")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    import jax

    import pallas_qk
    from benchmarks import providers

    options = parser(list(providers.PROVIDERS)).parse_args(arguments)
    missing = [package for package in ("torch", "triton") if importlib.util.find_spec(package) is None]
    if missing:
        print(
            "The oracle is a Triton kernel on torch tensors: torch and triton must be installed, got no "
            f"{' and no '.join(missing)}. Run pip install 'pallas-qk[torch]'.",
            file=sys.stderr,
        )
        return 1
    platform = jax.default_backend()
    if platform not in ("gpu", "cpu") or (platform == "cpu" and options.command == "run"):
        needed = "an NVIDIA GPU" if options.command == "run" else "an NVIDIA GPU or a CPU"
        print(f"{options.command} needs {needed}, got JAX's default backend {platform!r}.", file=sys.stderr)
        return 1
    if platform == "gpu":
        import torch

        if not torch.cuda.is_available():
            print(
                f"torch must see the GPU that JAX uses, got torch {torch.__version__} without CUDA. "
                "Install torch's CUDA build.",
                file=sys.stderr,
            )
            return 1
    match options.command:
        case "run":
            from benchmarks.run import Settings, run

            cases = suites.timed(options.tokens, options.heads, options.head_dim, options.rotary_dim, options.dtype)
            settings = Settings(options.repeats, options.rounds, options.cache, options.op)
            return run(cases, options.implementations, settings, options.output, options.commit)
        case "verify":
            from benchmarks.verify import verify

            if platform == "cpu":
                return verify(suites.parity_cpu(), ("xla",), platform)
            return verify(suites.parity_gpu(), pallas_qk.IMPLEMENTATIONS, platform)
        case _:
            from benchmarks.demo import demo

            return demo(platform)


if __name__ == "__main__":
    sys.exit(main())
