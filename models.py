"""Load a model from a folder or by its name on the hub: the one loader of all stages.

    runs/qwen/iter_01/policy                   a folder, as save_pretrained writes it
    Qwen/Qwen2.5-1.5B-Instruct                 a name: the newest commit of its main branch
    Qwen/Qwen2.5-1.5B-Instruct@989aa79         a branch, a tag or a commit of it

A name alone does not fix the weights: its owner may push others tomorrow. So a name is first
resolved to a commit. All files are read from that commit, and it is recorded in the metadata of
everything that was made with it.

Three things hold for whatever is loaded here:

  - None of its code runs. A folder may contain Python files; transformers asks on the terminal
    whether to run them, unless it is told not to.
  - None of its weights are random. transformers fills in what the files lack, and continues.
  - Whatever fails to load ends in one message: what it is, why, and what to do.

    python models.py NAME                      prints the name with its commit, a folder as it is
"""

import functools
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# It imports torch when one of its classes is first used, and `python models.py` uses none.
import transformers
from transformers.utils.hub import cached_file, extract_commit_hash

from records import Stop

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(@.+)?")  # as in "gpt2", "Qwen/Qwen3-8B@main"


def split(name: str) -> tuple[str, str | None]:
    """A name and its revision: "Qwen/Qwen3-8B@v1" -> ("Qwen/Qwen3-8B", "v1").

    A path that exists stays whole, with an @ in it or without.
    """
    if os.path.exists(name):
        return name, None
    repository, _, revision = name.partition("@")
    return repository, revision or None


@functools.cache  # within a process a name means one commit, whatever is pushed meanwhile
def locate(name: str) -> tuple[str, str | None]:
    """What from_pretrained takes: (folder, None), or (hub name, commit).

    Raises Stop where neither a folder here nor the hub, or its cache, has such a model.
    """
    if os.path.exists(name):
        return name, None
    if not HUB_NAME.fullmatch(name):
        remedy = "A model is a folder, or a hub name as in ORG/NAME@REVISION"
        raise Stop(f"{name}: no such file or folder. {remedy}.")
    repository, revision = split(name)
    try:
        config = cached_file(repository, "config.json", revision=revision)
    except Exception as error:
        raise Stop(
            f"{name}: no such file or folder, and the hub has no such model for us "
            f"({one_line(error)}). Check the spelling, the revision and the connection. Offline, "
            "only models that were downloaded before can be used."
        ) from None
    # The client keeps a file under …/snapshots/COMMIT/, whatever revision was asked for.
    commit = extract_commit_hash(config, None)
    if commit is None:
        remedy = "Name a model that transformers can load"
        raise Stop(f"{name}: has no config.json on the hub. {remedy}.")
    return repository, commit


def pinned(name: str) -> str:
    """The name with its commit, "Qwen/Qwen3-8B@b968826d…", which never changes its meaning.

    A folder is returned as it is.
    """
    repository, commit = locate(name)
    return f"{repository}@{commit}" if commit else name


def identity(name: str) -> str:
    """The name of a hub model in the metadata: "hub:NAME@COMMIT". (A folder has its hash.)"""
    return "hub:" + pinned(name)


def load_config(name: str):
    """The model's config.json, as transformers' class for it."""
    repository, commit = locate(name)
    with loading(name, "config.json"):
        return transformers.AutoConfig.from_pretrained(
            repository, revision=commit, trust_remote_code=False
        )


def load_tokenizer(name: str):
    repository, commit = locate(name)
    with loading(name, "tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            repository, revision=commit, trust_remote_code=False
        )
    if len(tokenizer) == 0:  # what transformers makes of a folder without one
        remedy = "Save the model's own beside its weights, with save_pretrained"
        raise Stop(f"{name}: has no tokenizer. {remedy}.")
    return tokenizer


def load_generation_config(name: str, config):
    """generation_config.json. It is optional: without it, what the model's `config` says about
    generation. A damaged one stops: the ids that end an answer may stand nowhere else.
    """
    repository, commit = locate(name)
    file = "generation_config.json"
    with loading(name, file):  # a hub that cannot be reached must not count as a file that is none
        found = cached_file(
            repository, file, revision=commit, _raise_exceptions_for_missing_entries=False
        )
        if found is None:
            return transformers.GenerationConfig.from_model_config(config)
        return transformers.GenerationConfig.from_pretrained(repository, revision=commit)


def load_model(auto_class, name: str, dtype, attn_implementation: str):
    """The network with its weights, on the CPU, in evaluation mode.

    auto_class: AutoModelForCausalLM, for example. dtype: a torch.dtype, or "auto" for that of the
    files. Raises Stop when the model cannot be built, and when its files lack a weight or hold it
    in another shape.
    """
    repository, commit = locate(name)
    with loading(name, "model"):
        model, found = auto_class.from_pretrained(
            repository,
            revision=commit,
            trust_remote_code=False,
            dtype=dtype,
            attn_implementation=attn_implementation,
            ignore_mismatched_sizes=True,  # not ignored: named below
            output_loading_info=True,
        )
    # Tied weights are in the files once, and do not count as missing.
    lost = sorted(found["missing_keys"])
    for key, have, want in sorted(found["mismatched_keys"]):
        lost.append(f"{key} (of shape {want}, not {have})")
    if lost:
        shown = ", ".join(lost[:4])
        if len(lost) > 4:
            shown += f" and {len(lost) - 4} more"
        raise Stop(
            f"{name}: its files hold no weights for {shown}, so it would be random there. "
            "Download or save it again, or name the model that the weights belong to."
        )
    return model


@contextmanager
def loading(name: str, part: str) -> Iterator[None]:
    """Whatever fails within becomes one message. part: what is loaded, such as "tokenizer"."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the tokenizers' Rust code panics with no Exception
        raise cannot_load(name, part, error) from None


def cannot_load(name: str, part: str, error: BaseException) -> Stop:
    """The message for the user. part: the part that could not be loaded, such as "tokenizer"."""
    if "trust_remote_code" in str(error):
        return wants_code(name, part)
    return Stop(
        f"{name}: its {part} cannot be loaded ({type(error).__name__}: {one_line(error)}). A model "
        "is a folder with config.json, weights and tokenizer, or a name on the hub: see that all "
        "are there."
    )


def wants_code(name: str, part: str) -> Stop:
    return Stop(
        f"{name}: its {part} needs code that came with it, which is not run here. Name a model "
        "that transformers itself knows; a reward can be called from a --reward_fn of yours."
    )


def one_line(error: BaseException) -> str:
    """The error's message on one line and without a full stop, to stand in parentheses."""
    return " ".join(str(error).split()).rstrip(".")


if __name__ == "__main__":
    print(pinned(sys.argv[1]))
