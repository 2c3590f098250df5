"""What is recorded of a run is what its whole engine launches; a CPU records nothing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from fastsft_kernels.launch import record_launches

from fastsft.config import make_config
from fastsft.model import precompile
from fastsft.model.plan import Plan

CPU = torch.device("cpu")
TOKENIZER = SimpleNamespace(new_ids=[], vocab_size=512)


def kinds(launches):
    def kind(x):
        return (x.dtype, x.data_ptr() % 16) if isinstance(x, torch.Tensor) else x

    return {
        (la.kernel.__name__, str([kind(a) for a in la.args]), str(la.options)) for la in launches
    }


@pytest.mark.parametrize("method", ["lora", "full"])
def test_blocks_of_each_kind_launch_what_all_blocks_do(method):
    config = make_config({"model": "builtin:tiny", "data": "d", "method": method})
    with record_launches() as recording:
        engine, tokens = precompile.engine_of_shapes(config, TOKENIZER, CPU, 500, None)
        layers = engine.spec.layers
        engine.plan = Plan(("recompute_block",) + ("keep",) * (layers - 1))
        batches = list(precompile.micro_batches(tokens, 500))[2:3]
        for batch in batches:
            engine.loss(batch, step=1).loss_sum.backward()
            engine.evaluate(batch)
        whole = kinds(recording.launches)
        recording.launches.clear()
        precompile.record_steps(engine, batches)
        assert whole and kinds(recording.launches) == whole


def test_a_cpu_pays_nothing():
    config = make_config({"model": "there is none", "data": "d"})
    with precompile.compiled_ahead(config, None, CPU, 8, None, None) as ahead:
        pass
    assert ahead.misses is None
