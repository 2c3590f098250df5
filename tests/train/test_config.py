"""The configuration surface is frozen here, and everything wrong in it gets one clear sentence."""

import pytest
import yaml

from fastsft.config import Config, DataSource, LoraConfig, load_config, make_config
from fastsft.errors import UserError

BASE = ["model=m", "data=rows.jsonl"]

KEYS = """
model revision tokenizer trust_remote_code method adapter engine lora new_tokens data eval_data
val_size on_bad_row streaming shuffle chat_template chat_template_kwargs date system stop train_on
multi_turn max_length overlong batch_size batch_tokens micro_batch_tokens activations epochs
max_steps learning_rate lr_scheduler warmup_ratio warmup_steps min_lr_ratio decay_ratio
weight_decay max_grad_norm optimizer masters update_in_backward dtype vram seed
logging_steps eval_steps save_steps
save_total_limit early_stopping_patience sample_prompts resume output_dir run_name report_to
""".split()


def test_the_surface_is_frozen():
    """A new key is a promise to every user; adding one is meant to fail here first."""
    assert list(Config.model_fields) == KEYS
    assert (
        list(LoraConfig.model_fields)
        == "r alpha dropout target_modules use_rslora modules_to_save".split()
    )
    assert list(DataSource.model_fields) == (
        "path name split revision format columns roles max_rows weight".split()
    )


def test_words_override_the_file_and_values_are_yaml(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: m\ndata: a.jsonl\nlora: {r: 4}\n")
    config = load_config(
        file, ["lora.r=8", "learning_rate=2e-4", "data=[{path: b.json, weight: 2}]"]
    )
    assert (config.lora.r, config.lora.alpha, config.learning_rate) == (8, 32, 2e-4)
    assert config.data == [DataSource(path="b.json", weight=2)]


def test_a_word_for_one_of_a_pair_displaces_the_file_s_other(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: m\ndata: a.jsonl\nepochs: 3\nbatch_tokens: 99\n")
    config = load_config(file, ["max_steps=5", "batch_size=8"])
    assert (config.epochs, config.max_steps) == (None, 5)
    assert (config.batch_size, config.batch_tokens) == (8, None)
    with pytest.raises(UserError, match="exactly one of epochs and max_steps"):
        load_config(file, ["max_steps=5", "epochs=2"])


def test_written_and_read_back_it_is_the_same(tmp_path):
    config = load_config(
        None, [*BASE, "max_steps=3", "batch_tokens=4096", "report_to=[tensorboard]"]
    )
    assert config.epochs is None and config.batch_size is None
    assert make_config(yaml.safe_load(config.to_yaml())) == config


WRONG = {
    "batchsize=3": "unknown key 'batchsize': did you mean 'batch_size'?",
    "lora.rank=3": "unknown key 'lora.rank': known keys: r, alpha",
    "data=[{path: a, wieght: 2}]": "unknown key 'data.0.wieght': did you mean 'weight'?",
    "zzzz=1": "unknown key 'zzzz': known keys: model",
    "per_device_train_batch_size=1": "here it is batch_size",
    "gradient_accumulation_steps=1": "here it is batch_size",
    "num_train_epochs=1": "here it is epochs",
    "sequence_len=1": "here it is max_length",
    "cutoff_len=1": "here it is max_length",
    "lora_r=1": "here it is lora.r",
    "load_in_4bit=true": "here it is method: qlora",
    "val_set_size=1": "here it is val_size",
    "packing=true": "packing is always on",
    "assistant_only_loss=true": "train_on: assistant",
    "train_on_inputs=true": "train_on: all",
    "seed=x": "seed: expected a valid integer; got 'x'",
    "batch_size=true": "batch_size: expected a valid integer; got True",
    "batch_size=0": "batch_size: expected greater than 0; got 0",
    "method=dora": "method: expected 'lora', 'qlora' or 'full'; got 'dora'",
    "lora.dropout=1.0": "lora.dropout: expected less than 1; got 1.0",
    "vram=24": "vram: expected a valid string; got 24",
    "vram=lots": "a size such as 24GB",
    "date=yesterday": "a date such as 2026-01-31",
    "streaming=true": "set max_steps",
    "early_stopping_patience=2": "needs eval_data or val_size",
    "val_size=1.5": "a share; from 1 on it is a number of rows",
    "data=[]": "the list is empty",
    "learning_rate=[": "not valid YAML",
    "chat_template_kwargs={tools: [], x: 1}": "chat_template_kwargs: tools cannot be given",
    "chat_template_kwargs.add_generation_prompt=true": "add_generation_prompt cannot be given",
    "seed=4294967296": "seed: expected less than 4294967296",
    "novalue": "neither a config file nor key=value",
    "model.x=1": "model is 'm', which has no keys inside",
}


@pytest.mark.parametrize("word", WRONG)
def test_wrong_keys_and_values(word):
    with pytest.raises(UserError) as error:
        load_config(None, [*BASE, word])
    assert WRONG[word] in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["batch_size=1", "batch_tokens=1"], "exactly one of batch_size and batch_tokens"),
        (["epochs=1", "max_steps=1"], "exactly one of epochs and max_steps"),
        (["epochs=null"], "exactly one of epochs and max_steps"),
        (["val_size=1", "eval_data=b.jsonl"], "not both"),
        (["warmup_ratio=0.1", "warmup_steps=5"], "not both"),
        (["lr_scheduler=constant", "min_lr_ratio=0.1"], "never falls"),
        (["decay_ratio=0.1"], "belongs to lr_scheduler: wsd"),
        (["method=full", "lora.r=8"], "no meaning with method: full"),
        (["method=full", "adapter=a"], "adapter belongs to method lora or qlora"),
        (["streaming=true", "max_steps=2", "val_size=2"], "give eval_data instead"),
    ],
)
def test_keys_that_exclude_each_other(words, message):
    with pytest.raises(UserError, match=message):
        load_config(None, [*BASE, *words])


def test_every_mistake_is_told_at_once():
    with pytest.raises(UserError) as error:
        load_config(None, ["data=a", "seed=x", "epoch=2"])
    assert "model: this key is required" in str(error.value)
    assert "seed: expected" in str(error.value) and "did you mean 'epochs'" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("- a\n- b\n", "expected `key: value` lines; got a list"),
        ("model: m\nmodel: n\n", "line 2: the key 'model' is given twice"),
        ("model: [m\n", "not valid YAML"),
    ],
)
def test_wrong_files(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_config(file)
    assert str(file) in str(error.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="is a folder"):
        load_config(tmp_path)


def test_the_file_of_all_keys_is_true():
    """examples/all_keys.yaml is the documentation of the keys: names, order and defaults."""
    import pathlib

    path = pathlib.Path(__file__).parents[2] / "examples" / "all_keys.yaml"
    written = yaml.safe_load(path.read_text())
    assert list(written) == KEYS
    assert list(written["data"][0]) == list(DataSource.model_fields)
    expected = load_config(None, ["model=builtin:tiny", "data=data/train.jsonl"]).model_dump()
    assert written == expected


def test_the_example_configs_load():
    import pathlib

    folder = pathlib.Path(__file__).parents[2] / "examples"
    examples = sorted(folder.glob("*.yaml"))
    assert len(examples) >= 4
    for path in examples:
        assert load_config(path).model, path
