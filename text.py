"""Text: captions become sequences of vectors, which a network reads by cross-attention.

How a caption reaches an image:

    "a red star"                              a prompt, one of a list
      → an encoder            (l, text_width) a vector for each word, or token; then zeros
      → DiT.text_embedder     (l, width)      a small MLP
      → CrossAttention        in every layer, the tokens of all states read the vectors

Wherever a class network has the index of a class, a text network has the *index of a prompt* in a
list, `Prompts`. So sampling, guidance, trajectories and distillation are the same for both. Index
−1 is the empty prompt: guidance subtracts the prediction for it.

There are two encoders:

    words    for the scenes of scenes.py. A word becomes three parts, joined: a fixed random vector
             for itself; the vector of the word before it (in "red star", the vector for "star"
             also says "red"); and sinusoids for its position. This encoder is not learned.
    T5       for PixArt-α. `transformers` encodes a file of prompts, one a line, once:

                 python text.py --prompts FILE --encoder google/t5-v1_1-xxl --out DIR
"""

import startup  # noqa: F401  before the large packages

import difflib
import hashlib
import re
from functools import lru_cache
from math import ceil
from pathlib import Path

import numpy as np
import torch

from command_line import add_worker_flag, make_parser, positive_int, run_program
from files import UserError, fingerprint, one_line, optional_import
from machine import Progress, Runtime, add_machine_flags, runtime_from, wait_for_all
from scenes import indexed_captions
from shards import SHARD, Shards, read_meta, start_shards, write_shard

# ---- 1. Words ------------------------------------------------------------------------------------

WORD_WIDTH, POSITION_WIDTH = 24, 16  # features of a word, and of its position
TEXT_WIDTH = 2 * WORD_WIDTH + POSITION_WIDTH  # a word, the word before it, its position
LONGEST_CAPTION = 8  # words: "a red star left of a blue ring"
T5_LENGTH = 120  # tokens of T5, as PixArt-α was trained


@lru_cache(maxsize=1)
def vocabulary() -> list[str]:
    """All words of the captions of scenes.py, sorted. The empty prompt is the word ""."""
    words = {word for caption in indexed_captions() for word in str(caption).split()}
    return ["", *sorted(words)]


def positions(length: int) -> np.ndarray:
    """Sinusoids that tell the positions 0 … length − 1 apart, (length, POSITION_WIDTH)."""
    half = POSITION_WIDTH // 2
    omega = 100.0 ** -(np.arange(half) / half)
    angles = np.arange(length)[:, None] * omega
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def encode_words(prompt: str) -> np.ndarray:
    """A prompt as vectors, (LONGEST_CAPTION, TEXT_WIDTH); rows after its last word are zero. Raises
    UserError for a word that is in no caption of scenes.py, and prints a note where there are too
    many words."""
    words = re.sub(r"[.,;:!?]", " ", prompt.lower()).split() or [""]
    known = vocabulary()
    for word in words:
        if word not in known:
            near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
            hint = f"known words: {', '.join(known[1:])}"
            if near:
                hint = f"did you mean {' or '.join(near)}?"
            where = f"the word {word[:60]!r} of the prompt {prompt[:60]!r}"
            raise UserError(f"{where} is unknown: {hint}")
    if len(words) > LONGEST_CAPTION:
        print(f"note: the prompt {prompt[:60]!r} is cut after {LONGEST_CAPTION} words")
        words = words[:LONGEST_CAPTION]
    alone = np.zeros((len(words), WORD_WIDTH))
    for i, word in enumerate(words):
        rng = np.random.default_rng(known.index(word))
        alone[i] = rng.standard_normal(WORD_WIDTH)
    before = np.concatenate([np.zeros((1, WORD_WIDTH)), alone[:-1]])
    vectors = np.zeros((LONGEST_CAPTION, TEXT_WIDTH), np.float32)
    vectors[: len(words)] = np.concatenate([alone, before, positions(len(words))], axis=1)
    return vectors


@lru_cache(maxsize=1)
def scene_prompts() -> "Prompts":
    """The prompts of scenes.py, in the order of `indexed_captions`."""
    return Prompts([str(caption) for caption in indexed_captions()])


# ---- 2. Prompts ----------------------------------------------------------------------------------


class Prompts:
    """Prompts in memory, encoded word by word. prompts[y] are those with the indices y, a tensor
    (b,): vectors (b, l, text_width), on the device of y. Index −1 is the empty prompt."""

    def __init__(self, texts: list[str]):
        self.texts = list(texts)
        vectors = [encode_words(text) for text in [*self.texts, ""]]
        self.vectors = torch.from_numpy(np.stack(vectors))
        self.width = TEXT_WIDTH

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, y):
        self.vectors = self.vectors.to(y.device)
        return self.vectors[y]

    def __deepcopy__(self, memo):
        return self  # a copy of a network reads the same prompts


class EncodedPrompts:
    """A folder of prompts that `write_prompts` has encoded, memory-mapped. It is indexed like
    `Prompts`. Raises UserError where the folder is missing, incomplete, or something else."""

    def __init__(self, folder: str | Path):
        meta = read_meta(folder)
        if meta is None or meta.get("kind") != "prompts":
            raise UserError(f"{folder} is no folder of encoded prompts: python text.py makes one")
        try:
            self.count, self.width = meta["count"], meta["width"]
            record = prompt_record(meta["length"], self.width)
            # Stored with trajectories, so that they are not used with other prompts.
            self.fingerprint = f"{meta['prompts']}-{meta['encoder']}"
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder}/meta.json is damaged ({error!r})") from None
        self.shards = Shards(folder, record, ceil((self.count + 1) / SHARD))
        self.latest = torch.empty(0).long(), None  # indices, and their vectors

    def __len__(self):
        return self.count

    def __getitem__(self, y):
        indices, vectors = y.cpu(), self.latest[1]
        if not torch.equal(indices, self.latest[0]):  # each Euler step reads the same prompts again
            rows = [self.row(int(i) % (self.count + 1)) for i in indices]   # −1 is the last
            vectors = torch.from_numpy(np.stack(rows)).to(y.device).float()
            self.latest = indices, vectors
        return vectors.to(y.device)

    def row(self, i: int) -> np.ndarray:
        """(length, width), zero behind the last token."""
        vectors = np.array(self.shards.value("vectors", i))
        vectors[self.shards.value("tokens", i) :] = 0
        return vectors

    def __deepcopy__(self, memo):
        return self


def prompt_record(length: int, width: int) -> np.dtype:
    """What a shard holds of a prompt: how many tokens it has, and their vectors. (`label` is its
    index.)"""
    return np.dtype([("label", "<i8"), ("tokens", "<i4"), ("vectors", "<f2", (length, width))])


def prompt_length(text_width: int) -> int:
    """The usual number of vectors of that width in a prompt, padding included."""
    return LONGEST_CAPTION if text_width == TEXT_WIDTH else T5_LENGTH


# ---- 3. T5 ---------------------------------------------------------------------------------------


def read_prompts(file: Path) -> list[str]:
    """The lines of a text file. Raises UserError where there are none."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts in {file}: {error}") from None
    prompts = [line for line in lines if line]
    if not prompts:
        raise UserError(f"{file} holds no prompts: write one a line")
    if len(prompts) < len(lines):
        print(f"note: {len(lines) - len(prompts)} empty lines of {file} are left out")
    return prompts


def load_t5(name: str, device):
    """The tokenizer and the encoder of a T5, from a folder or by its name. Raises UserError where
    they, or the package, are missing, or not whole."""
    # The package imports lazily. Naming its modules shows here whether they can be imported.
    t5 = optional_import("transformers.models.t5.modeling_t5")
    auto = optional_import("transformers.models.auto.tokenization_auto")
    try:
        tokenizer = auto.AutoTokenizer.from_pretrained(name)
        encoder, found = t5.T5EncoderModel.from_pretrained(name, output_loading_info=True)
    except Exception as error:  # of several types, for a damaged folder or a wrong one
        raise UserError(f"no T5 encoder {name!r} ({one_line(error)}): name a folder") from None
    if found["missing_keys"]:
        raise UserError(f"the T5 {name!r} is not whole: it has no {min(found['missing_keys'])}")
    return tokenizer, encoder.to(device).eval().requires_grad_(False)


@torch.no_grad()
def encode_t5(tokenizer, encoder, prompts: list[str], length: int):
    """Prompts as vectors (b, length, width), and their numbers of tokens (b,)."""
    whole = tokenizer(prompts)["input_ids"]
    for prompt, ids in zip(prompts, whole, strict=True):
        if len(ids) > length:
            print(f"note: cut after {length} of {len(ids)} tokens: {prompt[:60]!r}")
    batch = tokenizer(
        prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).to(encoder.device)
    vectors = encoder(**batch).last_hidden_state                            # (b, length, width)
    return vectors.float().cpu().numpy(), batch["attention_mask"].sum(dim=1).cpu().numpy()


def write_prompts(
    file: Path,
    encoder_name: str,
    folder: Path,
    length: int,
    runtime: Runtime,
    worker: tuple[int, int],
):
    """Encode the prompts of a file, and the empty prompt after them, into shards. Shards that are
    there are kept. `worker`: see start_shards."""
    prompts = [prompt.lower() for prompt in read_prompts(file)]  # as PixArt-α was trained
    tokenizer, encoder = load_t5(encoder_name, runtime.device)
    width = encoder.config.d_model
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]
    meta = dict(
        kind="prompts",
        prompts=digest,
        encoder=fingerprint(encoder.state_dict()),
        count=len(prompts),
        length=length,
        width=width,
    )
    record = prompt_record(length, width)
    texts = [*prompts, ""]
    todo = start_shards(folder, meta, record, ceil(len(texts) / SHARD), worker)
    for number in Progress("encoding", todo, unit="prompts", size=SHARD):
        mine = texts[number * SHARD : (number + 1) * SHARD]
        encoded = []
        for start in range(0, len(mine), 16):
            encoded.append(encode_t5(tokenizer, encoder, mine[start : start + 16], length))
        vectors, tokens = zip(*encoded, strict=True)
        write_shard(
            folder,
            number,
            record,
            label=np.arange(number * SHARD, number * SHARD + len(mine)),
            tokens=np.concatenate(tokens),
            vectors=np.concatenate(vectors),
        )
    wait_for_all()


# ---- 4. The program ------------------------------------------------------------------------------


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--prompts", type=Path, required=True, metavar="FILE", help="a text file, a prompt a line")
    add("--encoder", required=True, help="T5 of transformers: a folder, or a name on its hub")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the vectors")
    add("--length", type=positive_int, default=T5_LENGTH, help="tokens of a prompt (default: 120)")
    add_worker_flag(parser)
    add_machine_flags(parser)
    flags = parser.parse_args()
    runtime = runtime_from(flags)
    write_prompts(
        flags.prompts, flags.encoder, flags.out, flags.length, runtime, flags.worker
    )
    print(f"wrote {flags.out}")


if __name__ == "__main__":
    run_program(main)
