"""A model by folder or by name on the hub: the one loader of all stages.

    runs/qwen/iter_01/policy                   a folder, as save_pretrained writes it
    Qwen/Qwen2.5-1.5B-Instruct                 a name: the newest commit of its main branch
    Qwen/Qwen2.5-1.5B-Instruct@989aa79         a branch, a tag or a commit of it

A name is no model yet: whoever owns it may push, and tomorrow it means other weights. So it is
resolved to a commit first, all files are read from that commit, and the commit stands in the
metadata of what was made with it.

Three things hold for whatever is loaded here:

  - None of its code runs. A folder may bring Python files along; transformers asks on the terminal
    whether to run them unless it is told not to.
  - None of its weights are random. transformers fills in what the files lack, and goes on.
  - Whatever fails to load says in one message what it is, why, and what to do.

    python models.py NAME                      prints the name with its commit; a folder as it is
"""

import functools
import os
import re
import sys

# its classes are imported when they are named, and torch with them: main needs neither
import transformers
from transformers.utils.hub import cached_file, extract_commit_hash

from records import Stop

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(@.+)?")  # as in "gpt2", "Qwen/Qwen3-8B@main"


def split(name: str) -> tuple[str, str | None]:
    """A name and its revision: "Qwen/Qwen3-8B@v1" -> ("Qwen/Qwen3-8B", "v1"). A path that exists
    stays whole.
    """
    if os.path.exists(name):
        return name, None
    repository, _, revision = name.partition("@")
    return repository, revision or None


@functools.cache  # within a process a name means one commit, even if the hub moves on
def locate(name: str) -> tuple[str, str | None]:
    """What from_pretrained takes as its name and its revision: (folder, None), or (hub name,
    commit).

    Raises Stop where neither a folder here nor the hub, or its cache, has such a model.
    """
    if os.path.exists(name):
        return name, None
    if not HUB_NAME.fullmatch(name):
        raise Stop(
            f"{name}: no such file or folder. A model is a folder, or a hub name as in ORG/NAME@REVISION."
        )
    repository, revision = split(name)
    try:
        config = cached_file(repository, "config.json", revision=revision)
    except Exception as error:
        raise Stop(
            f"{name}: no such file or folder, and no model that the hub gives us ({one_line(error)}). "
            "Check the spelling, the revision and the connection; offline, only what was downloaded before is there."
        ) from None
    # The client keeps a file under …/snapshots/COMMIT/, whatever revision was asked for.
    commit = extract_commit_hash(config, None)
    if commit is None:
        raise Stop(
            f"{name}: has no config.json on the hub. Name a model that transformers can load."
        )
    return repository, commit


def pinned(name: str) -> str:
    """The name with its commit, "Qwen/Qwen3-8B@b968826d…": one model for ever. A folder as it is."""
    repository, commit = locate(name)
    return f"{repository}@{commit}" if commit else name


def identity(name: str) -> str:
    """What a hub model is known by in the metadata, as a folder is by its hash: "hub:NAME@COMMIT"."""
    return "hub:" + pinned(name)


def load_config(name: str):
    """The model's config.json, as transformers' class for it."""
    repository, commit = locate(name)
    try:
        return transformers.AutoConfig.from_pretrained(
            repository, revision=commit, trust_remote_code=False
        )
    except Exception as error:
        raise cannot_load(name, "config.json", error) from None


def load_tokenizer(name: str):
    repository, commit = locate(name)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            repository, revision=commit, trust_remote_code=False
        )
    except Exception as error:
        raise cannot_load(name, "tokenizer", error) from None
    if len(tokenizer) == 0:  # what transformers makes of a folder without one
        raise Stop(
            f"{name}: has no tokenizer. Save the model's own beside its weights, with save_pretrained."
        )
    return tokenizer


def load_generation_config(name: str, config):
    """generation_config.json, which is optional; without it what `config`, the model's, says of
    generation.
    """
    repository, commit = locate(name)
    try:
        return transformers.GenerationConfig.from_pretrained(repository, revision=commit)
    except OSError:
        return transformers.GenerationConfig.from_model_config(config)


def load_model(auto_class, name: str, dtype, attn_implementation: str):
    """The network with its weights, on the CPU, in training mode off.

    auto_class: AutoModelForCausalLM, say. dtype: a torch.dtype, or "auto" for that of the files.
    Raises Stop when it cannot be built, and when its files lack a weight or hold it in another
    shape.
    """
    repository, commit = locate(name)
    try:
        model, found = auto_class.from_pretrained(
            repository,
            revision=commit,
            trust_remote_code=False,
            dtype=dtype,
            attn_implementation=attn_implementation,
            ignore_mismatched_sizes=True,  # for once, to name them below
            output_loading_info=True,
        )
    except Exception as error:
        raise cannot_load(name, "model", error) from None
    # Tied weights, which stand in the files once, are not among the missing ones.
    lost = sorted(found["missing_keys"])
    lost += [
        f"{key} (of shape {want}, not {have})"
        for key, have, want in sorted(found["mismatched_keys"])
    ]
    if lost:
        shown = ", ".join(lost[:4]) + (f" and {len(lost) - 4} more" if len(lost) > 4 else "")
        raise Stop(
            f"{name}: its files hold no weights for {shown}, so it would be random there. "
            "Download or save it again, or name the model that the weights belong to."
        )
    return model


def cannot_load(name: str, part: str, error: Exception) -> Stop:
    """The message for a person. `part`: of the model, as in "tokenizer"."""
    if "trust_remote_code" in str(error):
        return wants_code(name, part)
    return Stop(
        f"{name}: its {part} cannot be loaded ({type(error).__name__}: {one_line(error)}). "
        "A model is a folder with config.json, weights and tokenizer, or a name on the hub: see that all are there."
    )


def wants_code(name: str, part: str) -> Stop:
    return Stop(
        f"{name}: its {part} needs code that came with it, which is not run here. "
        "Name a model that transformers itself knows; a reward can be called from a --reward_fn of yours."
    )


def one_line(error: Exception) -> str:
    """Its message without line breaks, which transformers has many of, to stand in parentheses."""
    return " ".join(str(error).split()).rstrip(".")


if __name__ == "__main__":
    print(pinned(sys.argv[1]))
