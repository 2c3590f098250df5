"""A random model with a byte-level tokenizer, in a folder; and adapters for it that are not zero."""

import json

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 300
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder, template=None):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["hello there, hello world, what is this"] * 3, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "<|im_end|>" if template else "</s>"}
    if template:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_model(folder, *, template=None, dtype=torch.float32, **options):
    torch.manual_seed(5)
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    model = LlamaForCausalLM(LlamaConfig(**settings | options))
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.1 if parameter.ndim > 1 else parameter.data
    model.to(dtype).save_pretrained(folder)
    write_tokenizer(folder, template)
    return folder


def fill(adapters):
    """Adapters that change the logits visibly."""
    torch.manual_seed(6)
    for _, parameter in adapters.named_parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
