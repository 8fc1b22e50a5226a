"""What a model's own settings file says, asked field by field; what it lacks or cannot mean is told at the end."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from shardforge.core.errors import CheckpointError, ForgeError, Problems

SHOWN = 60
LARGEST = 2**31
"""No model has that many of anything."""

SILENT = (
    *("architectures", "model_type", "auto_map", "transformers_version", r"transformers\.js_config", "is_llama_config"),
    *("torch_dtype", "dtype", "use_bfloat16", "use_cache", "_?name_or_path", "_commit_hash", r"unsloth\w*"),
    *(r"_?attn_implementation\w*", r"_?experts_implementation\w*", r"_?(use_)?flash_att\w*", "reorder_and_upcast_attn"),
    *(r"\w+_token_ids?", r"\w*(bos|eos|pad|unk|sep|cls|mask)_token", "tokenizer_class", "vocab_file"),
    *("max_position_embeddings", "n_ctx"),
    *("(model_max|max_sequence|seq)_length", "(min|max)_(new_)?(length|tokens)", "chunk_size_feed_forward"),
    *("initializer_range", r"\w*dropout", r"\w+_pdrop", "pretraining_tp", "gradient_checkpointing", r"summary_\w+"),
    *("output_attentions", "output_hidden_states", "output_router_logits", r"router_\w+_loss_coef", "output_scores"),
    *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params", "prefix"),
    *("return_dict", "return_dict_in_generate", "torchscript", "tf_legacy_loss", "cache_implementation"),
    *("do_sample", "early_stopping", r"num_beam\w*", "num_return_sequences", "temperature", "top_[kp]", "typical_p"),
    *(r"(diversity|repetition|length)_penalty", r"\w*suppress_tokens", r"\w*no_repeat_ngram_size", "bad_words_ids"),
)
"""Patterns of fields that no model computes anything by, however they are set."""
TRAINED = (
    *(r"(attention|hidden|embedding|residual|activation)_dropout", "dropout", r"(attn|embd|resid)_pdrop"),
    r"router_\w+_loss_coef",
)
"""Patterns of those that count in training alone: told, where they are set."""
CAUSAL = "is_causal"


class Settings:
    """A mapping of settings. Ask for all of them, then `settle`."""

    def __init__(self, data: Mapping[str, Any], path: Path):
        self.data, self.path = data, path
        self.problems: list[ForgeError] = []
        self.notes: list[str] = []
        self._asked: set[str] = set()

    def changed(self, fields: Mapping[str, Any]) -> Settings:
        """These settings with other values of some fields. What is asked for and noted there is so here too."""
        made = Settings({**self.data, **fields}, self.path)
        made.problems, made.notes, made._asked = self.problems, self.notes, self._asked
        return made

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or `default` where there is none or null; also, with a problem noted, where it is of another type
        than a default that is given."""
        self._asked.add(key)
        found = self.data.get(key)
        if found is None or default is None:
            return default if found is None else found
        if not (_number(found) if _number(default) else isinstance(found, type(default))):
            self.wrong(f"{key}={found!r} should be of the type of {default!r}")
            return default
        return found

    def given(self, key: str, default: Any) -> Any:
        """The value, null too; `default` only where there is none, as it is for fields that null switches off."""
        self._asked.add(key)
        return self.data.get(key, default)

    def need(self, key: str) -> Any:
        """A positive integer that has to be there; 1 stands for it, with a problem noted, when it is not."""
        found = self.get(key)
        if type(found) is int and 0 < found < LARGEST:
            return found
        told = "is missing" if found is None else f"is {found!r}, not a positive integer below {LARGEST}"
        self.wrong(f"{key} {told}")
        return 1

    def positive(self, key: str, usual: float) -> float:
        """A positive number; `usual` where there is none, and, with a problem noted, where it is no such number."""
        found = self.get(key, usual)
        if type(found) in (int, float) and found > 0:
            return float(found)
        self.wrong(f"{key}={found!r} is no positive number")
        return usual

    def only(self, key: str, *allowed: Any) -> None:
        """Note a problem unless the value is absent, null, or one that ShardForge computes."""
        found = self.get(key)
        if found is not None and found not in allowed:
            self.wrong(f"{key}={found!r} is not supported, only {' or '.join(map(repr, allowed))}")

    def choose(self, key: str, table: Mapping[str, str], default: str) -> str:
        """Our word for one of theirs."""
        found = self.get(key, default)
        if found not in table:
            self.wrong(f"{key}={found!r} is not supported, only {', '.join(table)}")
        return table.get(found, table[default])

    def unknown(self, keys: Collection[str], why: str) -> None:
        """Note those of `keys` that are set."""
        for key in keys:
            if self.get(key):
                self.wrong(f"{key}={self.data[key]!r}: {why}")

    def note(self, what: str) -> None:
        """Keep a line on what is there and cannot be taken along, once."""
        if what not in self.notes:
            self.notes.append(what)

    def wrong(self, what: str) -> None:
        self.problems.append(CheckpointError(what, self.path))

    def settle(self) -> None:
        """Problems when there were any; one is a field that nobody has asked for, unless it is switched off."""
        silent, trained = re.compile("|".join(SILENT)), re.compile("|".join(TRAINED))
        if self.given(CAUSAL, True) is not True:
            self.wrong(f"{CAUSAL}={self.data[CAUSAL]!r} is not supported, only True")
        fix = "take it out of config.json if it does not change what the model computes"
        for key, found in self.data.items():
            if found and key not in self._asked and trained.fullmatch(key):
                self.note(f"{key}={found!r}: it counts in training alone, where a recipe says its own")
            elif found and key not in self._asked and not silent.fullmatch(key):
                told = repr(found)
                short = told if len(told) < SHOWN else f"{told[:SHOWN]}..."
                self.problems.append(CheckpointError(f"{key}={short} is a field that is not supported", self.path, fix))
        if self.problems:
            raise Problems(self.problems, str(self.path))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
