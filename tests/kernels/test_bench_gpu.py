"""The benchmark's own path, on a CPU: what is wrong is not timed, what was measured is kept."""

import dataclasses
import json

import bench_toys
import pytest
import torch
from kernel_checks import randn

from bench import accuracy, choices, gpu, kernels, timing, worth
from bench import check as check_module
from bench.kernels import attention
from bench.limits import Work

TOYS = ["--cases", "bench_toys"]


def run(folder, *args):
    code = gpu.main([*args, "--out", str(folder)])
    (path,) = folder.glob("*/kernels.json")
    return code, json.loads(path.read_text())


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    return run(tmp_path_factory.mktemp("toys"), *TOYS, "--search")


def of(toys, **key):
    return [r for r in toys[1]["rows"] if all(r.get(k) == v for k, v in key.items())]


def test_what_fails_its_check_is_named_and_not_timed(toys):
    assert toys[0] == 1
    assert not any(r["problem"] for r in of(toys, kind="check", op="right"))
    (found,) = [r for r in of(toys, kind="check", op="wrong", dtype="float32") if r["problem"]]
    assert found["choice"] == "toy_wrong=1" and "not finite" in found["problem"]
    unstable = {r["problem"] for r in of(toys, kind="check", op="unstable")}
    assert unstable and all("two runs give different bits" in problem for problem in unstable)
    assert {r["op"] for r in of(toys, kind="time")} == {"right", "in_place"}


def test_every_configuration_is_checked_in_every_dtype(toys):
    rows = of(toys, kind="check", op="right")
    labels = ["", "toy_right_form=torch", "toy_right=1"]
    assert [(r["dtype"], r["choice"]) for r in rows] == [
        (dtype, label) for dtype in ("float16", "float32") for label in labels
    ]


def test_ours_and_peers_are_timed_and_a_missing_peer_says_so(toys):
    assert {r["who"] for r in of(toys, kind="time", op="right")} == {"fastsft", "torch", "peer"}
    (ours,) = of(toys, kind="time", op="right", who="fastsft")
    assert 0 < ours["p20"] <= ours["p50"] <= ours["p80"] and ours["passes"] >= 3
    assert ours["gb_per_s"] == pytest.approx(ours["bytes"] / ours["p50"] / 1e9)
    (rates,) = of(toys, kind="rates")
    limit = ours["bytes"] / rates["bandwidth"]
    assert ours["share_of_limit"] == pytest.approx(limit / ours["p50"])
    (missing,) = of(toys, kind="time", op="right", who="peer")
    assert missing["error"] == "ImportError: no module named peer" and "p50" not in missing


def test_an_input_that_is_overwritten_is_restored_before_each_pass(toys):
    (ours,) = of(toys, kind="time", op="in_place", who="fastsft")
    assert "p50" in ours  # the case raises where its input has grown


def test_a_search_times_every_configuration(toys):
    rows = of(toys, kind="search", op="right")
    assert [r["candidate"] for r in rows] == [None, "torch", {"BN": 128}]
    assert not of(toys, kind="search", op="in_place")  # one configuration: nothing to choose


def test_circumstances_are_written_down(toys):
    about = toys[1]["circumstances"]
    assert about["card"] and about["source"] and about["versions"]["torch"] == torch.__version__
    assert {"commit", "command", "driver", "when", "python"} <= set(about)


def test_a_second_run_goes_on_from_the_first(tmp_path):
    first = run(tmp_path, *TOYS, "--ops", "right")
    second = run(tmp_path, *TOYS, "--ops", "right,in_place")
    key = {"kind": "time", "op": "right"}
    assert of(first, **key) == of(second, **key) and of(second, op="in_place")
    (path,) = tmp_path.glob("*/kernels.json")
    text = path.read_text().replace(first[1]["circumstances"]["source"], "other")
    path.write_text(text)
    third = run(tmp_path, *TOYS, "--ops", "in_place")
    assert not of(third, **key), "rows of other kernels were kept"


def test_a_case_that_ended_the_process_is_left_out_of_the_next(tmp_path):
    found = run(tmp_path, *TOYS, "--ops", "right,in_place", "--skip", "right 1000")
    assert found[0] == 1 and not of(found, kind="time", op="right")
    assert [r["problem"] for r in of(found, op="right")] == ["ended the process"]
    assert of(found, kind="time", op="in_place")


def test_an_unknown_op_is_refused():
    with pytest.raises(ValueError, match=r"no case of \['rihgt'\]"):
        gpu.main([*TOYS, "--ops", "rihgt"])


def search(case, name, candidate, seconds):
    key = {"kind": "search", "op": "rope", "case": case}
    return key | {"name": name, "candidate": candidate, "p50": seconds}


def test_the_winner_is_the_fastest_over_all_cases():
    wide, narrow = {"BN": 128}, {"BN": 32}
    rows = [
        *(search("a", "", None, 10.0), search("a", "rope", wide, 8.0)),
        *(search("a", "rope", narrow, 5.0), search("a", "form", "other", 9.9)),
        *(search("b", "", None, 10.0), search("b", "rope", wide, 8.0)),
        *(search("b", "rope", narrow, 20.0), {"kind": "check"}),
    ]
    assert choices.winners(rows) == {"rope": wide}  # "other" is faster by less than the noise


def test_choices_hold_what_rows_say_and_nothing_else():
    assert choices.CHOICES.read_text() == choices.text(), "run: python -m bench.choices"


def test_every_case_runs_on_a_cpu(tmp_path, monkeypatch):
    """The reference in its own place: shows that inputs, oracle, work and rows fit together."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code, found = run(tmp_path, "--quick", "--seed", "0")
    wrong = [r for r in found["rows"] if r.get("problem")]
    assert code == 0, wrong or [r for r in found["rows"] if r.get("who") == "fastsft"]


@pytest.mark.parametrize(
    "change,said",
    [
        (lambda x: x, ""),
        (lambda x: x * (1 + 2e-2), "rms error"),
        (lambda x: torch.cat([x[:1] + 0.01, x[1:]]), "largest error"),
        (lambda x: torch.cat([x[:1] * torch.nan, x[1:]]), "1 numbers not finite"),
        (lambda x: x.double(), "shape and dtype"),
        (lambda x: x[1:], "shape and dtype"),
    ],
)
def test_the_rule(change, said):
    plain, exact = randn(1000, dtype=torch.float16), randn(1000).double()
    problem = accuracy.judge(change(plain), exact, plain).problem
    assert problem.startswith(said) if said else not problem


def test_integers_are_compared_exactly():
    a = torch.arange(5)
    assert not accuracy.judge_all([a], [a], [a]).problem
    assert accuracy.judge_all([a + 1], [a], [a]).problem == "output 0 of 1: 5 of 5 differ"


def test_timing_restores_before_every_pass():
    log = []
    calls = [lambda: log.append("call")] * 3
    found = timing.measure(calls, torch.device("cpu"), 0.0, lambda: log.append("restore"))
    assert found.passes == 3 and found.calls == 3
    assert log == ["restore", "call", "call", "call"] * 5  # two passes warm up
    assert Work(1) == (1, 0, 0)


def test_on_a_gpu_the_device_sleeps_while_the_host_enqueues(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return 6.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"))
    calls = [lambda: log.append("call")] * 3
    found = timing.measure(calls, torch.device("cuda"), 0.0)
    assert found.p50 == pytest.approx(2e-3)
    assert log[6:] == ["sleep", "event", "call", "call", "call", "event", "wait"] * 3


def broken(x):
    raise ZeroDivisionError("in the recording" if x.device.type == "meta" else "in the run")


def test_a_case_that_cannot_be_recorded_is_a_row(tmp_path, monkeypatch):
    first, *_, last = bench_toys.cases()
    first = dataclasses.replace(first, run=broken)
    monkeypatch.setattr(bench_toys, "cases", lambda: [first, last])
    found = run(tmp_path, *TOYS)
    assert found[0] == 1
    problems = {r["problem"] for r in of(found, op="right")}
    assert problems == {"ZeroDivisionError: in the recording"}
    assert of(found, kind="time", op="in_place", who="fastsft")


def test_inputs_or_work_that_fail_are_a_row(tmp_path, monkeypatch):
    first, *_, last = bench_toys.cases()
    first = dataclasses.replace(first, work=lambda x: 1 // 0)
    monkeypatch.setattr(bench_toys, "cases", lambda: [first, last])
    code, found = run(tmp_path, *TOYS, "--search")
    assert code == 1
    (row,) = of((code, found), kind="time", op="right")
    assert row["error"].startswith("ZeroDivisionError")
    assert of((code, found), kind="time", op="in_place", who="fastsft")


def test_defaults_are_one_configuration_in_one_dtype_and_peers(tmp_path):
    found = run(tmp_path, *TOYS, "--ops", "right,wrong", "--defaults")
    assert found[0] == 0, "wrong in a configuration that is not the default"
    checks = of(found, kind="check", op="right")
    assert [(r["dtype"], r["choice"]) for r in checks] == [("float32", "")]
    assert {r["who"] for r in of(found, kind="time", op="right")} == {"fastsft", "torch", "peer"}


def test_a_limit_ends_between_cases_and_the_next_run_goes_on(tmp_path, monkeypatch, capsys):
    now = iter(range(1000))
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(now))  # a second each time it is asked
    found = run(tmp_path, *TOYS, "--ops", "right,in_place", "--limit", "2")
    assert found[0] == 0 and of(found, op="right") and not of(found, op="in_place")
    assert "2 s are over" in capsys.readouterr().out
    checks = of(found, kind="check")
    checked = []
    verdicts = check_module._verdicts
    monkeypatch.setattr(
        check_module,
        "_verdicts",
        lambda *given: checked.append((given[1].op, len(given[-1]))) or verdicts(*given),
    )
    found = run(tmp_path, *TOYS, "--ops", "right,in_place")
    assert [n for op, n in checked if op == "right"] == [0, 0], "checked again"
    assert of(found, kind="check", op="right") == checks and of(found, kind="time", op="in_place")


def test_what_is_overwritten_is_known_without_a_second_check(tmp_path):
    run(tmp_path, *TOYS, "--ops", "in_place")
    (path,) = tmp_path.glob("*/kernels.json")
    kept = json.loads(path.read_text())
    kept["rows"] = [r for r in kept["rows"] if r["kind"] != "time"]
    path.write_text(json.dumps(kept))
    found = run(tmp_path, *TOYS, "--ops", "in_place")
    (ours,) = of(found, kind="time", who="fastsft")
    assert "p50" in ours  # restored: the case raises where its input has grown


def test_what_decides_a_step_comes_first():
    ordered = worth.by_worth(kernels.find())
    names = [f"{case.op} {case.label}" for case in ordered]
    assert names[0] == "varlen_attention forward 4k D 128"
    assert names[1] == "varlen_attention backward 4k D 128"
    for op, label in worth.WORTH:  # a name that no case has any more would order nothing
        assert any(name.startswith(f"{op} {label}") for name in names), (op, label)
    assert names.index("lora_linear forward 8192x4096->14336 R 16") < names.index(
        "varlen_attention forward 4k D 64"
    )


@pytest.mark.parametrize("groups_known", [True, False])
def test_torch_s_attention_gets_what_its_version_takes(groups_known, monkeypatch):
    seen = []

    def new(q, k, v, cu_q, cu_k, n_q, n_k, *, window_size=(-1, -1), enable_gqa=False):
        seen.append((q.shape[1], k.shape[1], v.shape[1], enable_gqa))
        return q * k.repeat_interleave(q.shape[1] // k.shape[1], 1)

    def old(q, k, v, cu_q, cu_k, n_q, n_k, *, window_size=(-1, -1)):
        seen.append((q.shape[1], k.shape[1], v.shape[1], False))
        return q * k + 0 * v

    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", new if groups_known else old)
    cases = {case.label: case for case in attention.cases()}
    name = "torch varlen_attn" + ("" if groups_known else ", K and V expanded")
    case = cases["forward 4k D 128"]
    assert [peer for peer in case.peers if "varlen" in peer] == [name]
    inputs = case.small(torch.device("cpu"), torch.float32)
    q, k = inputs[:2]
    out = case.peers[name](*inputs)()
    ratio = q.shape[1] // k.shape[1]
    assert ratio == 4
    torch.testing.assert_close(out, q * k.repeat_interleave(ratio, 1))
    heads = k.shape[1] if groups_known else q.shape[1]
    assert seen == [(q.shape[1], heads, heads, groups_known)]
    back = cases["backward 4k D 128"]
    given = back.small(torch.device("cpu"), torch.float32)
    if not groups_known:  # the fake of the other has no gradient for V
        dq, dk, dv = back.peers[name](*given)()
        assert dq.shape == dk.shape == dv.shape == given[1].shape
    equal = cases["forward 4k D 96, not causal, no list"]
    assert "torch varlen_attn" in equal.peers  # as many heads: nothing to expand
