"""Kernels of a run compiled while its weights load: what a step will launch, recorded on meta tensors.

    config.json -> model of shapes -> adapters -> plan -> engine -> recorded micro-batches -> processes

Only on a GPU with the fast engine; elsewhere nothing is recorded and nothing started. What is recorded
follows from the settings, as the run itself does, so that afterwards nothing is left to compile. Where this
goes wrong, training compiles each kernel at its first launch, and is told why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from fastsft_kernels.launch import Recording, has_triton, record_launches

from fastsft.config import Config
from fastsft.data.batches import MicroBatch
from fastsft.device import choose_dtype
from fastsft.errors import UserError
from fastsft.model.block import Block
from fastsft.model.build import master_dtype, put_adapters
from fastsft.model.context import StepContext
from fastsft.model.extras import resize_vocabulary
from fastsft.model.fast import FastEngine
from fastsft.model.load import model_config, resolve_model
from fastsft.model.planning import job_of, make_plan
from fastsft.model.shapes import meta_batch, shaped_model
from fastsft.model.spec import NotFast, read_spec

if TYPE_CHECKING:
    from fastsft_kernels.precompile import Misses

    from fastsft.console import RunConsole
    from fastsft.data.tokenizer import Tokenizer

ROUND = 64  # tokens of a micro-batch on a GPU are a multiple


def micro_batches(tokens: int, longest: int) -> Iterator[MicroBatch]:
    """Sizes between which kernels are specialised: full and nearly empty, their trained rows even and odd."""
    tokens += -tokens % ROUND
    whole, rest = divmod(tokens, longest)
    yield meta_batch([longest] * whole + [rest] * (rest > 0), tokens - 1)
    yield meta_batch([tokens // 4] * 4, tokens // 2)
    yield meta_batch([ROUND], ROUND // 2)
    yield meta_batch([ROUND], 1)


def distinct_blocks(engine: FastEngine) -> list[Block]:
    """The first block and the last, and of blocks that launch the same kernels two: these stand for all."""
    spec, seen = engine.spec, Counter[Any]()
    chosen = []
    for block in engine.blocks:
        i = block.index
        parts = tuple((bool(p.nf4), p.resident, p.r, p.p, p.rows) for p in block.projections)
        kind = (engine.plan.policies[i], spec.rope[i], spec.windows[i], parts)
        seen[kind] += 1
        if i in (0, spec.layers - 1) or seen[kind] <= 2:
            chosen.append(block)
    return chosen


def record_steps(engine: FastEngine, batches: Iterable[MicroBatch]) -> None:
    """Trains on and evaluates each micro-batch; inside a recording, and on the meta device.

    One block of each kind stands for all: the engine is of no use afterwards.
    """
    engine.blocks = distinct_blocks(engine)
    for batch in batches:
        engine.loss(batch, step=1).loss_sum.backward()
        engine.model.zero_grad(set_to_none=True)  # what trains outside the blocks would add up
        engine.evaluate(batch)


def engine_of_shapes(
    config: Config, tokenizer: Tokenizer, device: torch.device, longest: int, resume: Path | None
) -> tuple[FastEngine, int]:
    """(the run's engine on the meta device, tokens of its micro-batches).

    device: the one that will train. resume: a checkpoint whose adapters will be loaded. Raises NotFast
    where the compat engine will run.
    """
    full, dtype = config.method == "full", choose_dtype(config.dtype, device)
    folder = resolve_model(config.model, config.revision)
    shapes = model_config(folder, config.trust_remote_code)
    spec = read_spec(shapes)
    masters = master_dtype(config, dtype) if full else dtype
    model = shaped_model(shapes, masters, nf4=config.method == "qlora")
    context = StepContext(seed=config.seed)
    with torch.device("meta"):
        if not full:
            put_adapters(config, model, tokenizer, context, resume)
        elif tokenizer.new_ids:
            resize_vocabulary(model, tokenizer.vocab_size)
    planned = make_plan(config, job_of(model, spec, config, dtype), device, longest).planned
    early = config.update_in_backward
    engine = FastEngine(model, context, dtype=dtype, plan=planned.plan, shared_sums=early)
    return engine, planned.micro_batch_tokens


def record_run(
    config: Config, tokenizer: Tokenizer, device: torch.device, longest: int, resume: Path | None
) -> Recording:
    """What the run's steps will launch on `device`. Raises NotFast as `engine_of_shapes` does."""
    card = torch.cuda.get_device_properties(device)
    capability = 10 * card.major + card.minor
    with record_launches(capability, card.multi_processor_count, card.name) as recording:
        engine, tokens = engine_of_shapes(config, tokenizer, device, longest, resume)
        record_steps(engine, micro_batches(tokens, longest))
    return recording


@dataclass
class Ahead:
    """Kernels under way. `misses` counts, from where loading ended, what compiled all the same."""

    misses: Misses | None = None


@contextmanager
def compiled_ahead(
    config: Config,
    tokenizer: Tokenizer,
    device: torch.device,
    longest: int,
    resume: Path | None,
    console: RunConsole,
) -> Iterator[Ahead]:
    """The run's kernels compile while the body loads its weights, and are there at its end.

    longest: tokens of the longest row. What goes wrong is said in one line; training then compiles at its
    launches.
    """
    ahead = Ahead()
    if device.type != "cuda" or config.engine == "compat" or not has_triton():
        yield ahead
        return
    from fastsft_kernels.precompile import Misses, Precompile, PrecompileError, recipes

    work = None
    try:
        work = Precompile(recipes(record_run(config, tokenizer, device, longest, resume).launches))
    except NotFast:  # the compat engine's few kernels compile as they come
        pass
    except (RuntimeError, ValueError, TypeError, AssertionError, OSError, UserError) as error:
        console.warn(f"kernels compile at their first launch, slower: {_one_line(error)}")
    if work is None:
        yield ahead
        return
    with closing(work):
        yield ahead
        try:
            with console.task("waiting for the kernels"):
                done = work.join()
        except PrecompileError as error:
            console.warn(f"kernels compile at their first launch, slower: {_one_line(error)}")
        else:
            console.print(f"compiled {done.kernels} kernels in {done.seconds:.0f} s")
            if done.problems:
                console.warn(f"{len(done.problems)} will be built at a launch: {done.problems[0]}")
    ahead.misses = Misses()


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
