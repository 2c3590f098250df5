"""Our kernels inside other people's trainers, through transformers', PEFT's and TRL's own extension points.

    import fastsft.integrations                     attn_implementation="fastsft" is known from here on
    changes = fastsft.integrations.accelerate(m)    norm, MLP, LoRA, attention and loss of a loaded model

With TRL, two lines: `trainer = SFTTrainer(...)`, `accelerate(trainer.model)`. See examples/use_in_trl.py.
"""

from fastsft.integrations.acceleration import accelerate
from fastsft.integrations.attention import register_attention
from fastsft.integrations.changes import Change, Changes
from fastsft.integrations.linear import nf4_view

__all__ = ["Change", "Changes", "accelerate", "nf4_view", "register_attention"]

register_attention()
