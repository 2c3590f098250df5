"""LoRA training speed on a CPU against TRL + PEFT: the same tiny model, rows and tokens a micro-batch.

    python -m bench.cpu_training [--quick]     writes bench/results/cpu/training.json

Seeded Alpaca-like chats (bench.data), builtin:tiny in fp32, r = 16 on all linear layers, two threads, 64
examples a step in micro-batches of 2,048 tokens. TRL runs as people run it: padded batches of 8 rows (about
as many tokens), and packed rows of 2,048 tokens (strategy bfd, which isolates documents). Each trainer is a
process of its own; the first steps are left out; tokens are real ones, padding does not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.data import TEMPLATE, circumstances, write_rows

RESULTS = Path(__file__).parent / "results" / "cpu" / "training.json"
MODEL = Path(__file__).parent.parent / "fastsft" / "builtin" / "tiny"
TRAINERS = ("fastsft", "trl padded", "trl packed")
MICRO_BATCH, LONGEST, BATCH, WARM = 2048, 512, 64, 2


def run_fastsft(data: Path, steps: int, out: Path) -> list[tuple[float, int]]:
    """(seconds, real tokens) of each step."""
    import fastsft

    fastsft.train(
        {
            "model": str(MODEL),
            "method": "lora",
            "data": [{"path": str(data)}],
            "max_length": LONGEST,
            "batch_size": BATCH,
            "micro_batch_tokens": MICRO_BATCH,
            "max_steps": steps,
            "learning_rate": 1e-3,
            "chat_template": str(data.with_suffix(".jinja")),
            "output_dir": str(out),
        }
    )
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["step_seconds"], row["total_tokens"]) for row in rows if "loss" in row]


def run_trl(data: Path, steps: int, out: Path, packed: bool) -> list[tuple[float, int]]:
    """The same from TRL's trainer, timed by a callback and its own count of tokens that are not padding."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = TEMPLATE
    tokenizer.pad_token = tokenizer.eos_token
    rows = MICRO_BATCH // 256  # of about 256 tokens each
    config = SFTConfig(
        output_dir=str(out),
        max_length=MICRO_BATCH if packed else LONGEST,
        packing=packed,
        per_device_train_batch_size=1 if packed else rows,
        gradient_accumulation_steps=BATCH // rows,
        max_steps=steps,
        learning_rate=1e-3,
        assistant_only_loss=True,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            marks.append(time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            marks.append(time.perf_counter())

    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32"),
        args=config,
        train_dataset=load_dataset("json", data_files=str(data), split="train"),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        callbacks=[Clock()],
    )
    trainer.train()
    counts = [0.0] + [log["num_tokens"] for log in trainer.state.log_history if "num_tokens" in log]
    seconds = [end - begin for begin, end in zip(marks[::2], marks[1::2], strict=True)]
    tokens = [int(b - a) for a, b in zip(counts, counts[1:], strict=False)]
    return list(zip(seconds, tokens, strict=False))


def measure(who: str, data: Path, steps: int, out: Path) -> dict[str, Any]:
    """One trainer in a process of its own."""
    command = [sys.executable, "-m", "bench.cpu_training", "--child", who]
    command += ["--data", str(data), "--steps", str(steps), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"bench": "training", "who": who, "error": done.stderr.strip().splitlines()[-1]}
    timed = json.loads(done.stdout.splitlines()[-1])[WARM:]
    speeds = sorted(tokens / seconds for seconds, tokens in timed)
    twentieth = statistics.quantiles(speeds, n=10, method="inclusive")
    return {
        "bench": "training",
        "who": who,
        "micro_batch_tokens": MICRO_BATCH,
        "batch_size": BATCH,
        "steps": len(timed),
        "tokens_per_second": sum(t for _, t in timed) / sum(s for s, _ in timed),
        "p20": twentieth[1],
        "p50": statistics.median(speeds),
        "p80": twentieth[7],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps, nothing written")
    parser.add_argument("--child", choices=TRAINERS, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    for name in ("--data", "--out"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child == "fastsft":
        print(json.dumps(run_fastsft(given.data, given.steps, given.out)))
        return
    if given.child:
        packed = given.child == "trl packed"
        print(json.dumps(run_trl(given.data, given.steps, given.out, packed)))
        return
    steps = 4 if given.quick else 12
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        write_rows(data, BATCH * steps)
        data.with_suffix(".jinja").write_text(TEMPLATE)
        results = []
        for who in TRAINERS:
            results.append(measure(who, data, steps, Path(folder) / who.replace(" ", "-")))
            print(results[-1], flush=True)
    if not given.quick:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        facts = circumstances()
        RESULTS.write_text(json.dumps([{**row, **facts} for row in results], indent=1) + "\n")
        print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
