"""Our kernels under TRL's SFTTrainer: two lines, and the losses stay what they were.

    trainer = SFTTrainer(...)
    accelerate(trainer.model)

The built-in model of three million parameters learns questions about Python's standard library, once as TRL
trains it and once with our kernels in it, LoRA and packing on. Nothing is downloaded.

    python examples/use_in_trl.py           about half a minute on a CPU
"""

import tempfile

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from fastsft.builtin import model_path
from fastsft.integrations import accelerate

ROWS = [
    {"text": f"What does `{name}` do? It {what}."}
    for name, what in {
        "json.dumps": "serialises an object to a JSON string",
        "os.getcwd": "returns the current working directory",
        "time.sleep": "delays execution for a number of seconds",
        "math.gcd": "returns the greatest common divisor",
        "shutil.copy": "copies a file and its permissions",
        "random.choice": "picks a random element of a sequence",
        "textwrap.dedent": "removes common leading whitespace",
        "bisect.insort": "inserts an item and keeps the list sorted",
    }.items()
] * 8


def losses(folder: str, ours: bool) -> list[float]:
    """The loss of each step, with our kernels or without."""
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype="float32")
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=folder,
            max_length=128,
            packing=True,
            per_device_train_batch_size=2,
            max_steps=6,
            learning_rate=2e-3,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            bf16=False,
            use_cpu=True,
        ),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(model_path()),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    )
    if ours:
        print(accelerate(trainer.model))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        without, with_ours = losses(folder, ours=False), losses(folder, ours=True)
    for step, pair in enumerate(zip(without, with_ours, strict=True), start=1):
        print(f"step {step}  loss without {pair[0]:.5f}  with {pair[1]:.5f}")
    assert all(abs(a - b) < 1e-3 * a for a, b in zip(without, with_ours, strict=True))
    print(f"ok: the same losses, {without[0]:.3f} -> {without[-1]:.3f}")


if __name__ == "__main__":
    main()
