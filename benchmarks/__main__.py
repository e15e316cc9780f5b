"""The command line: python -m benchmarks COMMAND, of which --help lists every one."""

import argparse
import importlib.util
import os
import pathlib
import sys
from collections.abc import Sequence

from benchmarks import suites

# JAX and torch share the GPU here, so JAX must not reserve three quarters of it; read when JAX starts.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

WITHOUT_CASES = ("model", "compile", "scaling")  # suites that aren't lists of cases with a device time each
READERS = ("plot", "table", "compare")  # commands that read a record and compute nothing on a device
GPU_COMMANDS = ("run", "tune")
WITHOUT_ORACLE = ("decode", "host")  # commands that need no torch


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

    def add(name: str, text: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=list(parents))

    shapes = argparse.ArgumentParser(add_help=False)
    shapes.add_argument("--tokens", type=positive, nargs="+", metavar="T", help="default: the suite's")
    shapes.add_argument("--heads", type=heads, nargs="+", metavar="Hq/Hkv", help="default: the suite's")
    shapes.add_argument("--head-dim", type=positive, metavar="D", help="default: the suite's, 256")
    shapes.add_argument("--rotary-dim", type=positive, metavar="R", help="default: the suite's, 64")
    shapes.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="bfloat16")
    shapes.add_argument("--implementations", choices=implementations, nargs="+", default=list(implementations))
    written = argparse.ArgumentParser(add_help=False)
    written.add_argument("--output", type=pathlib.Path, help="default: benchmarks/results/<gpu>.jsonl")
    written.add_argument("--commit", help="recorded as the commit; default: what git says here")
    read = argparse.ArgumentParser(add_help=False)
    read.add_argument(
        "--record", type=pathlib.Path, nargs="+", metavar="FILE", help="default: benchmarks/results/*.jsonl"
    )

    run = add("run", "time the implementations beside the oracle and the copy ceiling (GPU)", shapes, written)
    run.add_argument("--suite", choices=(*suites.SUITES, *WITHOUT_CASES), nargs="+", default=["forward"])
    run.add_argument("--peers", nargs="+", default=[], metavar="[NAME=]FILE", help="Triton source of other kernels")
    run.add_argument(
        "--repeats",
        type=positive,
        help="calls of each in a round; default: 40, down to 8 for long ones and 3 of models",
    )
    run.add_argument("--rounds", type=positive, help="in each everything runs in turn; default: 5, of models 3")
    run.add_argument(
        "--cache", choices=("hot", "cold"), nargs="+", default=["hot"], help="cold: L2 overwritten before each call"
    )
    add("verify", "compare every implementation with the oracle over a sweep of cases")
    add("demo", "a few Qwen3.5 shapes: agreement, time and GB/s")
    decode = add("decode", "a decode step of a gated attention layer: CUDA graphs and host time", shapes, written)
    decode.add_argument(
        "--context", type=positive, nargs="+", default=[1024], help="tokens of each sequence in the cache"
    )
    decode.add_argument("--forms", nargs="+", metavar="FORM", help="how caches are written and read; default: some")
    decode.add_argument(
        "--programs", nargs="+", metavar="PROGRAM", help="default: XLA's own, all in CUDA graphs, and no graphs"
    )
    decode.add_argument("--steps", type=positive, default=200, help="timed steps of each program")
    host = add("host", "the processor's time: of an eager and a jitted call, and to trace and lower a layer", written)
    host.add_argument("--layers", type=positive, help="of the model that is traced and lowered; default: 48")
    profile = add("profile", "write a trace for XProf and Perfetto, and print what it holds", shapes)
    profile.add_argument("--repeats", type=positive, default=10)
    profile.add_argument("--output", type=pathlib.Path, required=True, metavar="FOLDER", help="new or empty")
    tune = add("tune", "what other launch configurations would gain on this GPU, as a table for an issue", shapes)
    tune.add_argument("--form", choices=suites.TUNED_FORMS, default="gate", help="of the call")
    tune.add_argument("--direction", choices=("forward", "backward"), nargs="+", default=["forward", "backward"])
    plot = add("plot", "pictures of a record: time and share of the copy ceiling against tokens", read)
    plot.add_argument("--run", help="the beginning of a run's id; default: the latest run with each operation")
    plot.add_argument("--output", type=pathlib.Path, metavar="FOLDER", help="default: benchmarks/results")
    table = add("table", "tables of a run in Markdown", read)
    table.add_argument("run", help="the beginning of a run's id")
    compare = add("compare", "what got slower from one run to another, against its noise; status 1 if something", read)
    compare.add_argument("before", help="the beginning of a run's id, or a file")
    compare.add_argument("after", help="likewise")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    from benchmarks import providers

    options = parser(list(providers.PROVIDERS)).parse_args(arguments)
    try:
        if options.command in READERS:
            return read_record(options)
        if problem := missing(options.command):
            print(problem, file=sys.stderr)
            return 1
        return measure(options)
    except ValueError as error:
        print(f"{options.command}: {error}", file=sys.stderr)
        return 2


def read_record(options: argparse.Namespace) -> int:
    from benchmarks import compare, plot, record, table

    paths = options.record or sorted(record.RESULTS.glob("*.jsonl"))
    match options.command:
        case "plot":
            return plot.plot(record.read(paths), options.run, options.output or record.RESULTS)
        case "table":
            print(table.tables(record.of_run(record.read(paths), options.run)))
            return 0
        case _:
            return compare.compare(compare.rows_of(options.before, paths), compare.rows_of(options.after, paths))


def missing(command: str) -> str | None:
    """What the command lacks on this machine, and the remedy; None if nothing."""
    import jax

    packages = [package for package in ("torch", "triton") if importlib.util.find_spec(package) is None]
    if packages and command not in WITHOUT_ORACLE:
        return (
            "The oracle is a Triton kernel on torch tensors: torch and triton must be installed, got no "
            f"{' and no '.join(packages)}. Run pip install 'pallas-qk[torch]'."
        )
    platform = jax.default_backend()
    if platform not in ("gpu", "cpu") or (platform == "cpu" and command in GPU_COMMANDS):
        needed = "an NVIDIA GPU" if command in GPU_COMMANDS else "an NVIDIA GPU or a CPU"
        return f"{command} needs {needed}, got JAX's default backend {platform!r}."
    if platform == "gpu" and command not in WITHOUT_ORACLE:
        import torch

        if not torch.cuda.is_available():
            return (
                f"torch must see the GPU that JAX uses, got torch {torch.__version__} without CUDA. "
                "Install torch's CUDA build."
            )
    return None


def measure(options: argparse.Namespace) -> int:
    import jax

    import pallas_qk
    from benchmarks import record

    platform = jax.default_backend()
    on_cpu = platform == "cpu"
    match options.command:
        case "run":
            return run_suites(options)
        case "decode":
            from benchmarks import decode, providers

            layers = [
                decode.Layer(q, kv, options.head_dim or 256, options.rotary_dim or 64, context, dtype=options.dtype)
                for q, kv in options.heads or ((16, 2),)
                for context in options.context
            ]
            names = [name for name in options.implementations if name in providers.JAX_OPS]
            forms = options.forms or [x for x in decode.DEFAULT_FORMS if not on_cpu or "cudnn" not in x]
            if unknown := [form for form in forms if form not in decode.FORMS]:
                raise ValueError(f"a form is one of {', '.join(decode.FORMS)}, got {', '.join(unknown)}.")
            programs = options.programs or list(decode.PROGRAMS)
            if unknown := [program for program in programs if program not in decode.PROGRAMS]:
                raise ValueError(f"a program is one of {', '.join(decode.PROGRAMS)}, got {', '.join(unknown)}.")
            recorded = record.new_run(options.output, options.commit)
            tokens = options.tokens or decode.TOKENS
            return decode.run(layers, forms, tokens, names, options.steps, recorded, programs)
        case "host":
            from benchmarks import host

            return host.run(record.new_run(options.output, options.commit), num_layers=options.layers or host.LAYERS)
        case "profile":
            from benchmarks import profile

            if options.output.exists() and any(options.output.iterdir()):
                raise ValueError(f"the folder of a trace must be new or empty, got {options.output}.")
            chosen = suites.timed(
                ("forward",),
                options.tokens or ((8,) if on_cpu else (1, 256, 16384)),
                options.heads or ((16, 2),),
                options.head_dim,
                options.rotary_dim,
                options.dtype,
            )
            # Without a GPU the kernels don't run, and the oracle is interpreted.
            names = [name for name in options.implementations if not on_cpu or name.startswith("xla")]
            return profile.profile([task.case for task in chosen], names, options.repeats, options.output)
        case "tune":
            from benchmarks import machine, tune

            cases = suites.tuned(
                options.form, options.tokens, options.heads, options.head_dim, options.rotary_dim, options.dtype
            )
            names = [name for name in options.implementations if name in tune.IMPLEMENTATIONS]
            if warning := machine.slowdown(machine.clocks()):
                print(warning)
            return tune.tune(cases, names, options.direction, machine.gpu_name(), machine.versions())
        case "verify":
            from benchmarks.verify import verify

            return verify(suites.verified(platform), ("xla",) if on_cpu else pallas_qk.IMPLEMENTATIONS, platform)
        case _:
            from benchmarks.demo import demo

            return demo(platform)


def run_suites(options: argparse.Namespace) -> int:
    """The suites asked for, one after another, all under one run id."""
    from benchmarks import compilation, machine, model, peers, providers, record, scaling
    from benchmarks.progress import say
    from benchmarks.run import Settings, run

    chosen = {name: providers.PROVIDERS[name] for name in options.implementations}
    for text in options.peers:
        peer = peers.load(text)
        stood_in = f"; stood in for: {', '.join(peer.stood_in)}" if peer.stood_in else ""
        say(f"peer {peer.name} from {text.rpartition('=')[2]}{stood_in}")
        if peer.name in chosen:
            raise ValueError(f"a peer must have a name of its own, got {peer.name}. Write NAME=FILE.")
        chosen[peer.name] = peer.build
    recorded = record.new_run(options.output, options.commit)
    if warning := machine.slowdown(recorded.clocks):
        say(warning)
    settings = Settings(options.repeats, options.rounds or 5, tuple(options.cache))
    status = 0
    names = [name for name in options.suite if name not in WITHOUT_CASES]
    if names:
        shape = (options.head_dim, options.rotary_dim, options.dtype)
        status |= run(suites.timed(names, options.tokens, options.heads, *shape), chosen, settings, recorded)
    if "model" in options.suite:
        status |= model.run(model.MODELS, recorded, options.repeats, options.rounds)
    if "compile" in options.suite:
        status |= compilation.run(suites.compiled(), options.implementations, recorded)
    if "scaling" in options.suite:
        status |= scaling.run(options.implementations, recorded, options.heads or suites.HEADS)
    if warning := machine.slowdown(machine.clocks()):
        say(warning)
    return status


if __name__ == "__main__":
    sys.exit(main())
