"""The planner on this machine: what a card and a host have. The card is played by its answers."""

from __future__ import annotations

import os

import pytest
import torch
from fastsft_kernels.cards import CARDS, DATASHEET
from live_bytes import LLAMA_8B
from transformers import AutoConfig

from fastsft import device as machine
from fastsft.config import make_config, size_in_bytes
from fastsft.errors import UserError
from fastsft.model import planning
from fastsft.model.job import Job, ranks_of
from fastsft.model.memory import CUDA_CONTEXT
from fastsft.model.planner import MARGIN
from fastsft.model.spec import read_spec

GB = 10**9
CUDA = torch.device("cuda", 0)


def config(**keys):
    return make_config({"model": "m", "data": "d", **keys})


def job():
    spec = read_spec(AutoConfig.for_model("llama", **LLAMA_8B))
    return Job(spec, "qlora", ranks_of(spec, "all-linear", 32))


@pytest.fixture
def card(monkeypatch):
    """A card of 24 GB on which another program holds 4 and this one, its model loaded, 5.5."""
    answers = {"name": "NVIDIA GeForce RTX 4090", "limits": []}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (14 * GB, 24 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 * GB)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: answers["name"])
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda s, d: answers["limits"].append(s)
    )
    monkeypatch.setattr(planning, "free_host_memory", lambda: 50 * GB)
    return answers


def test_auto_is_what_is_free_and_what_is_ours_less_a_margin(card):
    budget = planning.budget_of(config(), CUDA)
    assert budget.device == 19 * GB + CUDA_CONTEXT and budget.host == 40 * GB
    found = planning.make_plan(config(), job(), CUDA, 4096)
    assert found.planned.memory.peak <= budget.device * (1 - MARGIN)
    assert found.planned.memory.context > 0 and found.rates == CARDS["NVIDIA GeForce RTX 4090"]
    assert found.cheaper().planned.memory.peak < found.planned.memory.peak


def test_a_budget_is_the_allocators_limit_too(card):
    assert planning.budget_of(config(vram="12GB"), CUDA).device == 12 * GB
    planning.limit_allocator(config(vram="12GB"), CUDA)
    assert card["limits"] == [pytest.approx((12 * GB - CUDA_CONTEXT) / (24 * GB))]
    planning.limit_allocator(config(), CUDA)
    planning.limit_allocator(config(vram="12GB"), torch.device("cpu"))
    assert len(card["limits"]) == 1
    with pytest.raises(UserError, match=r"it has 24\.0 GB, of which 19\.5 GB are free"):
        planning.budget_of(config(vram="24GB"), CUDA)


def test_an_unknown_card_says_so(card):
    card["name"] = "NVIDIA Something 9"
    assert "NVIDIA Something 9 is not in the table" in planning.rates_of(CUDA).source
    assert all(c.source == DATASHEET or "measured" in c.source for c in CARDS.values())


def test_a_cpu_keeps_everything_unless_a_budget_is_given(monkeypatch):
    cpu = torch.device("cpu")
    free = planning.make_plan(config(), job(), cpu, 100).planned
    assert set(free.plan.policies) == {"keep"} and free.micro_batch_tokens == 2048
    assert free.memory.context == free.memory.workspace == 0
    given = planning.make_plan(config(activations="offload", micro_batch_tokens=99), job(), cpu, 9)
    assert set(given.planned.plan.policies) == {"offload"}
    assert given.planned.micro_batch_tokens == 99
    bound = planning.make_plan(config(vram="10GB"), job(), cpu, 100)
    assert bound.planned.memory.peak <= 10 * GB < free.memory.peak


def test_host_memory_stays_within_a_containers(monkeypatch, tmp_path):
    files = {
        "/proc/meminfo": "MemTotal: 99 kB\nMemAvailable:  64 kB\n",
        "/sys/fs/cgroup/memory.max": "50000\n",
        "/sys/fs/cgroup/memory.current": "20000\n",
    }

    class Fake(type(tmp_path)):
        def exists(self):
            return str(self) in files

        def read_text(self, *_, **__):
            return files[str(self)]

    monkeypatch.setattr(machine, "Path", Fake)
    assert machine.free_host_memory() == 30_000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert machine.free_host_memory() == 64 * 1024


def test_the_allocators_settings_of_the_user_stay(monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    machine.grow_segments()
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # so that it is taken back afterwards
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    machine.grow_segments()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


def test_sizes_are_decimal():
    assert size_in_bytes("24GB") == 24 * GB and size_in_bytes("0.5 gb") == GB // 2
    with pytest.raises(ValueError, match="a size such as 24GB"):
        size_in_bytes("24")
