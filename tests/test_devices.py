"""The op over eight host devices: equal bits, and no collective but the sum of the weights' gradients."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests.eight_devices import COLLECTIVE

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def results():
    """One process with eight devices runs every case."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.eight_devices"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", ["8x1-auto", "4x2-auto", "1x8-auto", "4x2-explicit"])
def test_forward_over_tokens_and_heads(results, mesh):
    got = results[f"forward-{mesh}"]
    assert got == {"bits": True, "collectives": [], "spec": "P('data', 'tensor')"}


@pytest.mark.parametrize("mesh", ["8x1", "4x2", "1x8"])
def test_backward_sums_only_the_weights_gradients(results, mesh):
    got = results[f"backward-{mesh}"]
    assert got["collectives"] == ["all-reduce"]
    assert max(got["errors"]) <= 2.0**-8  # bfloat16; XLA may sum a row in another order on a smaller array


def test_shard_map_with_the_varying_axes_check(results):
    assert results["shard_map"] == {"bits": True, "collectives": []}


def test_two_kv_heads_over_eight_devices_run_with_k_replicated(results):
    assert results["replicated_k"] == {"bits": True, "collectives": []}


def test_a_cut_head_is_refused_with_both_numbers(results):
    assert results["cut_head"]["error"] == (
        "k must hold whole heads on each device, got num_kv_heads=2 over 8 devices. "
        "Shard its last axis over a number of devices that divides 2, or leave it replicated there."
    )


def test_the_search_finds_collectives():
    text = "a = f32[] all-gather(b), c = f32[] all-reduce-start(d), e = f32[] collective-permute(f)"
    assert re.findall(COLLECTIVE, text) == ["all-gather", "all-reduce", "collective-permute"]
