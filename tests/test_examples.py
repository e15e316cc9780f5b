"""The examples, shortly."""

import math

import pytest


def test_training_step_learns():
    pytest.importorskip("tqdm", reason="the example's progress bar")
    from examples import train_step

    losses = train_step.train(120)
    assert abs(losses[0] - math.log(train_step.VOCABULARY)) < 0.2
    assert max(losses[-10:]) < 0.1


def test_sharded_gives_the_bits_of_one_device(capsys):
    from examples import sharded

    sharded.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[1].endswith("collectives []") and lines[3].endswith("collectives []")
    assert lines[4:] == ["the compiler partitions: the bits of one device", "in shard_map: the bits of one device"]
