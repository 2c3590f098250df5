"""End to end: every trainer on the same card, weights, rows and steps, each in a process of its own.

    job.py       what one process is to do, and how the parent runs it
    child.py     the process; clock.py measures in it
    ours.py      fastsft        trl.py   TRL with PEFT, Liger, Unsloth        plain.py   plain PyTorch
    models.py    the models, made of random weights        workloads.py   the rows
    work.py      operations a step needs

`python -m bench.train` compares speed and memory (__main__.py); `bench.context` and `bench.quality`
give the same processes other tasks.
"""
