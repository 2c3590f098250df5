"""argv -> one call. Nothing else; and nothing heavy is imported before a command is known.

Exit codes: 0 done, 1 a bug (traceback), 2 the user can fix it (one message, no traceback),
130 interrupted (a run that had begun has written a checkpoint).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fastsft.errors import UserError

CONFIG_WORDS = (
    "a YAML file, then key=value words that override it (values are YAML; nested keys: lora.r=8)"
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastsft", description="Supervised fine-tuning of language models: LoRA, QLoRA, full."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text)

    train = command("train", "train a model; without arguments, the built-in quickstart")
    train.add_argument("words", nargs="*", metavar="CONFIG.yaml key=value", help=CONFIG_WORDS)
    data = command("data", "show what the trainer will see: statistics and masks; trains nothing")
    data.add_argument("words", nargs="*", metavar="CONFIG.yaml key=value", help=CONFIG_WORDS)
    data.add_argument(
        "--examples", type=int, default=3, help="how many examples to print (default 3)"
    )
    plan = command("plan", "predicted memory and speed, per policy and card; loads no weights")
    plan.add_argument("words", nargs="*", metavar="CONFIG.yaml key=value", help=CONFIG_WORDS)
    plan.add_argument("--vram", help="plan for this much memory, such as 24GB")
    evaluate = command(
        "eval", "token-weighted loss, perplexity and accuracy of a run or model on data"
    )
    evaluate.add_argument("model", metavar="RUN_OR_MODEL")
    evaluate.add_argument("words", nargs="+", metavar="key=value", help="at least data=...")
    merge = command("merge", "adapter + base -> one bf16 checkpoint")
    merge.add_argument("adapter", metavar="RUN_OR_ADAPTER")
    merge.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    merge.add_argument(
        "--base",
        choices=("original", "dequantized"),
        default="original",
        help="weights to merge into: the checkpoint's own, or the NF4 values QLoRA trained against",
    )
    chat = command("chat", "talk to a run, an adapter or a model")
    chat.add_argument("model", metavar="RUN_OR_MODEL")
    chat.add_argument("--prompt", help="answer this one message and leave")
    for loads in (merge, chat):
        loads.add_argument(
            "--trust-remote-code",
            action="store_true",
            help="let Python code that comes with the model run (eval: trust_remote_code=true)",
        )
    command("doctor", "versions, GPU, which kernel runs each op, and a self-check of each")
    return parser


def split_words(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """(config path or None, key=value words). A word without `=` is the path; there is at most one."""
    paths = [word for word in words if "=" not in word]
    if len(paths) > 1:
        raise UserError(f"expected one config file; got {', '.join(paths)}")
    return (paths[0] if paths else None), [word for word in words if "=" in word]


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command in ("train", "data"):
        from fastsft.builtin import quickstart_path
        from fastsft.config import load_config

        path, overrides = split_words(arguments.words)
        if path is None and not any(w.startswith(("model=", "data=")) for w in overrides):
            path = str(quickstart_path())
        config = load_config(path, overrides)
        if arguments.command == "data":
            from fastsft.preparation import show_data

            return show_data(config, examples=arguments.examples)
        from fastsft.trainer import train

        return 130 if train(config, config_path=path).interrupted else 0
    if arguments.command == "plan":
        from fastsft.plan_command import show_plan

        path, overrides = split_words(arguments.words)
        return show_plan(path, overrides, arguments.vram)
    if arguments.command == "eval":
        from fastsft.evaluate import evaluate

        path, overrides = split_words(arguments.words)
        if path is not None:
            raise UserError(f"{path!r} is not key=value; name the data as data={path}")
        evaluate(arguments.model, overrides)
    elif arguments.command == "merge":
        from fastsft.model.merge import merge

        trusted = arguments.trust_remote_code
        merge(arguments.adapter, arguments.out, base=arguments.base, trust_remote_code=trusted)
    elif arguments.command == "chat":
        from fastsft.model.generate import chat

        trusted = arguments.trust_remote_code
        chat(arguments.model, prompt=arguments.prompt, trust_remote_code=trusted)
    else:
        from fastsft.doctor import doctor

        return doctor()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments)
    except UserError as error:
        print(f"fastsft: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastsft: interrupted", file=sys.stderr)
        return 130
