"""Build the corpus of the default model: clean, split, tokenizer, token ids.

`python data.py OUT` -> OUT/{train,held_out}.npz, tokenizer.json, LICENSES.txt, corpus.json

Needs Debian (or a relative) for the documentation; everything else is Python's own.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from chat_format import BEGIN, END, SPECIAL_TOKENS, exchange_text
from cleaning import Seen, clean, is_held_out, is_prose_or_code
from conversations import about_the_model, from_documentation, from_python
from sources import PROJECTS, fetch, licences, project_files, standard_library

VOCAB_SIZE = 6144
# A part of the held-out text goes with the model: of Python alone, from several short files.
PYTHON_ONLY = ("python", "python-doc")
MAX_SAMPLE_FILE, SAMPLE_CHARACTERS = 12_000, 100_000
# Words with the space before them, single digits, runs of punctuation, line ends with the
# indentation of the next line: a step to the left or right is one token.
PIECES = r"\n[ ]*| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|[ ]+(?!\S)|\s+"


def files(work: Path) -> Iterator[tuple[str, str, str]]:
    """(project, path, text) of every file that is kept, cleaned; no text comes twice."""
    seen = Seen()
    origins = [("python", standard_library())]
    origins += [(project.name, project_files(project, work)) for project in PROJECTS]
    for name, origin in origins:
        for path, raw in origin:
            text = clean(raw)
            if is_prose_or_code(text) and not seen.repeats(text):
                yield name, path, text


def make_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE: any text is tokens, and tokens are exactly that text again."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts as one row of ids, each with its begin and end."""
    end = [tokenizer.token_to_id(END)]
    encodings = tokenizer.encode_batch_fast(texts)
    return np.concatenate([np.array(e.ids + end, np.uint16) for e in encodings])


def build(work: Path, out: Path) -> None:
    """Everything from the packages in `work` to the files in `out`."""
    fetch(work)
    train, held_out, sample, sizes = [], [], [], Counter[str]()
    exchanges: dict[str, str] = {}  # question -> conversation
    for project, path, text in files(work):
        sizes[project] += len(text.encode())
        if is_held_out(path):
            held_out.append(text)
            if project in PYTHON_ONLY and len(text) <= MAX_SAMPLE_FILE:
                sample.append(text)
            continue
        train.append(text)
        made = from_python(text) if path.endswith(".py") else from_documentation(text)
        exchanges.update((exchange.question, exchange_text(*exchange)) for exchange in made)
    conversations = list(exchanges.values())
    conversations += [exchange_text(*exchange) for exchange in about_the_model()]

    tokenizer = make_tokenizer(train)
    tokenizer.save(str(out / "tokenizer.json"))
    train_ids = encode(tokenizer, train + conversations)
    held_out_ids = encode(tokenizer, held_out)
    np.savez_compressed(out / "train.npz", ids=train_ids)
    np.savez_compressed(out / "held_out.npz", ids=held_out_ids)
    (out / "held_out.txt").write_text("\n\n".join(sample)[:SAMPLE_CHARACTERS])
    (out / "LICENSES.txt").write_text(licences(work))
    corpus = {
        "bytes_by_project": dict(sizes.most_common()),
        "files": {"train": len(train), "held_out": len(held_out)},
        "conversations": len(conversations),
        "bytes": {
            "train": sum(len(text.encode()) for text in train),
            "conversations": sum(len(text.encode()) for text in conversations),
            "held_out": sum(len(text.encode()) for text in held_out),
        },
        "tokens": {"train": len(train_ids), "held_out": len(held_out_ids)},
        "vocab_size": tokenizer.get_vocab_size(),
    }
    (out / "corpus.json").write_text(json.dumps(corpus, indent=2) + "\n")
    print(json.dumps(corpus, indent=2))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder for the ids and the tokenizer")
    parser.add_argument(
        "--work", type=Path, help="folder for unpacked packages (default: OUT/work)"
    )
    arguments = parser.parse_args()
    work = arguments.work or arguments.out / "work"
    work.mkdir(parents=True, exist_ok=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    build(work, arguments.out)


if __name__ == "__main__":
    main()
