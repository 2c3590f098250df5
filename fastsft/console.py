"""What a person sees: a live status on a terminal, plain lines everywhere else.

On a terminal the lower lines are redrawn in place (bar, numbers, a curve of the loss) and events
scroll above them; the numbers that fit the width are shown, most telling first. Into a file or a
pipe goes one line per logged step, without colours, carriage returns or wrapping, so that grep and
tail work. Text that comes from models or data never reaches the terminal as control codes.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

BLOCKS = "▁▂▃▄▅▆▇█"
PLAIN_WIDTH = 100
Number = float | int | None


@dataclass
class RunSummary:
    """The facts said once before step 1. Token and row counts are those of one epoch."""

    model: str
    method: str
    engine: str
    engine_reason: str
    device: str
    dtype: str
    trainable: int
    parameters: int
    rows: int | None
    tokens: int | None
    trained_tokens: int | None
    total_steps: int
    first_step: int
    batch: str
    predicted_memory: int | None
    output_dir: Path
    notes: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)  # what runs each linear layer
    memory_parts: dict[str, int] = field(default_factory=dict)  # bytes of predicted_memory
    host_memory: int = 0

    def lines(self) -> list[tuple[str, str]]:
        share = self.trainable / max(1, self.parameters)
        rows = [
            ("model", f"{self.model} ({count(self.parameters)} parameters)"),
            ("method", f"{self.method}: {count(self.trainable)} trained ({share:.2%})"),
            ("engine", f"{self.engine}: {self.engine_reason}"),
            *(("path", path) for path in self.paths),
            ("device", f"{self.device}, {self.dtype}"),
        ]
        if self.rows is not None and self.tokens is not None:
            trained = (self.trained_tokens or 0) / max(1, self.tokens)
            rows.append(
                ("data", f"{self.rows:,} rows, {count(self.tokens)} tokens, {trained:.0%} trained")
            )
        steps = f"{self.total_steps:,}"
        if self.first_step:
            steps += f", going on after step {self.first_step:,}"
        rows += [("steps", steps), ("batch", self.batch)]
        if self.predicted_memory is not None:
            rows.append(("memory", self._memory(self.predicted_memory)))
        rows.append(("output", str(self.output_dir)))
        return rows + [("note", note) for note in self.notes]

    def _memory(self, predicted: int) -> str:
        """The prediction with the parts that matter."""
        large = {n: b for n, b in self.memory_parts.items() if b > 0.02 * predicted}
        text = f"{size(predicted)} predicted"
        if large:
            text += f": {', '.join(f'{name} {size(b)}' for name, b in large.items())}"
        return text + (f"; {size(self.host_memory)} of host memory" if self.host_memory else "")


class _Status:
    """The redrawn lines. Rich asks for them several times a second, at the width of the moment."""

    def __init__(self, total_steps: int, first_step: int) -> None:
        self.total, self.step = total_steps, first_step
        self.record: dict[str, Any] = {}
        self.eval_loss: float | None = None
        self.losses: list[float] = []
        self._began = time.monotonic()
        self._timed_from: tuple[float, int] | None = None

    def update(self, record: dict[str, Any]) -> None:
        self.step, self.record = record["step"], record
        if _finite(record.get("loss")):
            self.losses.append(record["loss"])
        if self._timed_from is None:  # the first record carries compilation and warm caches
            self._timed_from = (time.monotonic(), self.step)

    def eta(self) -> float | None:
        """Seconds left at the pace since the first record, evaluations included."""
        if self._timed_from is None or self.step <= self._timed_from[1]:
            seconds = self.record.get("step_seconds")
            return seconds * (self.total - self.step) if seconds else None
        since, step = self._timed_from
        return (time.monotonic() - since) / (self.step - step) * (self.total - self.step)

    def numbers(self) -> list[tuple[str, str]]:
        """(label, value), most telling first: the tail is dropped where the line is too short."""
        record, shown = self.record, []
        if "loss" in record:
            shown.append(("loss", number(record["loss"], ".4f")))
        if self.eval_loss is not None:
            shown.append(("eval", number(self.eval_loss, ".4f")))
        if record.get("tokens_per_second"):
            shown.append(("tokens/s", f"{record['tokens_per_second']:,.0f}"))
        if record.get("peak_memory_bytes"):
            shown.append(("memory", size(record["peak_memory_bytes"])))
        if "lr" in record:
            shown.append(("lr", number(record["lr"], ".2e")))
        if "grad_norm" in record:
            shown.append(("grad norm", number(record["grad_norm"], ".3g")))
        return shown

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(10, options.max_width - 1)
        eta = self.eta()
        spent = duration(time.monotonic() - self._began)
        tail = f" {self.step}/{self.total}"
        left = f"  {duration(eta)} left" if eta is not None and self.step < self.total else ""
        for extra in (f"  {spent}", left):
            if len(tail) + len(extra) + 12 <= width:
                tail += extra
        bar = max(0, min(60, width - len(tail)))
        full = round(bar * self.step / max(1, self.total))
        line = Text.assemble(("━" * full, "cyan"), ("━" * (bar - full), "bright_black"), tail)
        line.truncate(options.max_width)
        yield line
        line = Text()
        for label, value in self.numbers():
            item = Text.assemble(("  " if line else "", ""), (f"{label} ", "dim"), (value, "bold"))
            if line.cell_len + item.cell_len > width:
                break
            line += item
        yield line
        if len(self.losses) > 1 and width >= 40:
            yield Text(sparkline(self.losses, min(60, width)), style="cyan", no_wrap=True)


class RunConsole:
    """Everything `fastsft` says. `live` is whether status lines are redrawn in place."""

    def __init__(self, file: IO[str] | None = None, width: int | None = None) -> None:
        stream = file or sys.stdout
        if hasattr(stream, "reconfigure"):  # a log in ASCII must not end a run at a model's "é"
            stream.reconfigure(errors="replace")
        tty = stream.isatty()
        self.rich = Console(
            file=stream,
            width=width if tty else width or PLAIN_WIDTH,
            force_terminal=tty,
            color_system="auto" if tty else None,
            highlight=False,
        )
        self.live = tty and not self.rich.is_dumb_terminal
        self._status = _Status(0, 0)
        self._live: Live | None = None

    def print(self, *renderables: Any) -> None:
        """Strings as they are (no markup; wrapped on a terminal only), and rich renderables."""
        for item in renderables:
            if isinstance(item, str):
                self.rich.print(clean(item), markup=False, soft_wrap=not self.live)
            else:
                self.rich.print(item, soft_wrap=not self.live and isinstance(item, Text))

    def warn(self, message: str) -> None:
        text = Text.assemble(("warning: ", "yellow"), clean(message))
        self.rich.print(text, soft_wrap=not self.live)

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """A phase before training; the yielded function takes how much more of `total` is done."""
        began, done = time.monotonic(), 0

        def line() -> Text:
            share = f" {done / total:.0%}" if total else (f" {done:,}" if done else "")
            return Text(f"{label}{share}  {duration(time.monotonic() - began)}", style="dim")

        live = Live(get_renderable=line, console=self.rich, transient=True) if self.live else None

        def advance(amount: int) -> None:
            nonlocal done
            done += amount

        if live is None:
            yield advance
        else:
            with live:
                yield advance
        self.print(f"{label}: {duration(time.monotonic() - began)}")

    def summary(self, summary: RunSummary) -> None:
        """What is about to happen, as a two-column table."""
        lines = [(label, clean(value)) for label, value in summary.lines()]
        if not self.live:
            for label, value in lines:
                self.print(f"{label + ':':<9}{value}")
            return
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for label, value in lines:
            table.add_row(label, Text(value))
        self.rich.print()
        self.rich.print(table)
        self.rich.print()

    def start(self, total_steps: int, first_step: int = 0) -> None:
        """Begin the steps; `first_step` are done already (a resume)."""
        self._status = _Status(total_steps, first_step)
        if self.live:
            self._live = Live(self._status, console=self.rich, refresh_per_second=4)
            self._live.start()

    def step(self, record: dict[str, Any]) -> None:
        """A training record of metrics.jsonl."""
        self._status.update(record)
        if not self.live:
            numbers = "  ".join(f"{label} {value}" for label, value in self._status.numbers())
            eta = self._status.eta()
            left = f"  {duration(eta)} left" if eta is not None else ""
            self.print(f"step {record['step']}/{self._status.total}  {numbers}{left}")

    def evaluation(self, record: dict[str, Any], *, best: bool = False) -> None:
        """An evaluation record of metrics.jsonl; it stays on the screen."""
        loss = record["eval_loss"]
        self._status.eval_loss = loss if loss is not None else math.nan
        self.print(
            f"step {record['step']}: evaluation loss {number(loss, '.4f')}"
            f"  perplexity {number(record.get('eval_perplexity'), '.4g')}"
            f"  accuracy {number(record.get('eval_token_accuracy'), '.1%')}"
            + ("  (best so far)" if best else "")
        )

    def samples(self, title: str, answers: Sequence[tuple[str, str]]) -> None:
        """Prompts with the model's answers."""
        self.print(Text(title, style="bold"))
        for prompt, answer in answers:
            text = clean(answer).strip() or "(nothing)"
            self.print(Text.assemble(("  > ", "cyan"), (_indent(clean(prompt)), "dim")))
            self.print(Text("    " + _indent(text)))

    def stop(self) -> None:
        """End the live lines and leave their last state on the screen; safe to call twice."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def finish(self, message: str, next_command: str) -> None:
        """The closing words; the last line is the command to type next, alone, unwrapped."""
        self.stop()
        self.print(message)
        self.rich.print(Text(clean(next_command), style="bold"), soft_wrap=True)

    def __enter__(self) -> "RunConsole":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def clean(text: str) -> str:
    """Without characters that move a cursor or start an escape; newlines stay, tabs are spaces."""
    text = text.expandtabs(4)
    return "".join(
        c if c == "\n" or (c >= " " and not "\x7f" <= c <= "\x9f") else "�" for c in text
    )


def sparkline(values: Sequence[float], width: int) -> str:
    """One row of blocks: `values` averaged into at most `width` equal stretches, low to high."""
    stretches = min(width, len(values))
    edges = [round(i * len(values) / stretches) for i in range(stretches + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)


def count(value: int) -> str:
    """1234 -> 1,234; 12345 -> 12.3k; 8030261248 -> 8.03B."""
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            return f"{value / (1e3 if suffix == 'k' else limit):.3g}{suffix}"
    return f"{value:,}"


def size(value: int) -> str:
    """Bytes in GB (10^9), or MB below one."""
    return f"{value / 1e9:.3g} GB" if value >= 1e9 else f"{value / 1e6:.3g} MB"


def duration(seconds: float) -> str:
    """0:07, 12:34, 3:04:05."""
    whole = int(seconds)
    hours, minutes = divmod(whole // 60, 60)
    clock = f"{minutes}:{whole % 60:02d}"
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else clock


def number(value: Number, spec: str) -> str:
    return format(value, spec) if _finite(value) else "not finite"


def _finite(value: Number) -> bool:
    return value is not None and math.isfinite(value)


def _indent(text: str) -> str:
    return text.replace("\n", "\n    ")
