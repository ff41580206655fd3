"""Launched by test_parallel.py: train.py, writing down which samples each rank took in which step."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

import train
from cifar import models
from cifar.data import sampler

models.__path__.append(str(Path(__file__).parent / "networks"))  # `--network small`

unrecorded = sampler.DistributedBatchSampler.__iter__


def recorded(self: sampler.DistributedBatchSampler) -> Iterator[sampler.Samples]:
    rank, ranks = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    with Path(os.environ["RECORD"], f"{ranks}-{rank}.jsonl").open("a") as file:
        for step, samples in zip(self.steps, unrecorded(self), strict=True):
            file.write(json.dumps([step, np.transpose(samples).tolist()]) + "\n")
            file.flush()
            yield samples


sampler.DistributedBatchSampler.__iter__ = recorded  # type: ignore[method-assign]

if __name__ == "__main__":
    train.main()
