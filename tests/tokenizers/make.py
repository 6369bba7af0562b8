#!/usr/bin/env python3
"""Makes the folders here: folders with vocab.json and merges.txt, and what AutoTokenizer of transformers 5.23.0 makes of them.

    oracle/bin/python tests/tokenizers/make.py

`lines.jsonl` holds, for each text, `text`, its `ids` with special tokens, and these `decoded` without special tokens.
"""

import json
import random
import shutil
import sys
from pathlib import Path

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

HERE = Path(__file__).resolve().parent
VOCABULARY = 520
END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

WORDS = (
    "the of and a to in he was it his that I with her had said time upon once there king isn't you'll they've I'm he'd we're "
    "DON'T it'S x=1; foo(bar) 3.14159 1234567 2024-05-06 10,000 naïve café über Straße e\u0301te\u0301 \u212b \ufb01n ςσΣ мир "
    "Привет 你好 世界 日本語 テスト 한국어 שלום مرحبا हिन्दी 🙂 👩‍👩‍👧 🇩🇪 \u00a0 \u200b \u3000 ½ Ⅷ ٣٤ <b> </p> # @user \\n _x_ ... !!! ?! -- — «q»"
).split(" ")
SPACES = [" ", " ", " ", " ", "  ", "   ", "\n", "\n\n", " \n ", "\t", "\r\n", ""]


def token(text, **flags):
    return dict(content=text, lstrip=False, normalized=False, rstrip=False, single_word=False, special=True) | flags


# folder -> its files besides vocab.json and merges.txt
FOLDERS = {
    "gpt2": {
        "tokenizer_config.json": dict(
            tokenizer_class="GPT2TokenizerFast", add_prefix_space=True, add_bos_token=True, clean_up_tokenization_spaces=True
        ),
        "special_tokens_map.json": dict(
            bos_token=START, eos_token=token(END, normalized=True), pad_token="<pad>", extra_special_tokens=[STOP]
        ),
        "added_tokens.json": {START: VOCABULARY + 1, STOP: VOCABULARY + 2, "<tool>": VOCABULARY + 3},
    },
    "qwen2": {
        "tokenizer_config.json": dict(
            tokenizer_class="Qwen2Tokenizer", bos_token=None, eos_token=STOP, pad_token=END, unk_token=None, add_eos_token=True,
            additional_special_tokens=[START, STOP],
            added_tokens_decoder={
                str(VOCABULARY + 1): token(START), str(VOCABULARY + 2): token(STOP, lstrip=True),
                str(VOCABULARY + 3): token("<tool>", special=False, rstrip=True),
                str(VOCABULARY + 4): token("<wörd>", special=False, normalized=True, single_word=True),
            },
        ),
    },
    "family": {"config.json": dict(model_type="qwen3")},
}  # fmt: skip


def texts():
    rng = random.Random(5)
    yield from ["", " ", "\n", "a", END, f"{START}user\nHello!{STOP}\n", f"x {STOP} y{STOP}", "<tool> call", "a<wörd>b <wörd> c", "<pad>"]
    extra = [END, START, STOP, "<tool>", "<wörd>", "<pad>"]
    while True:
        parts = rng.choices(WORDS, k=rng.randint(1, 9))
        if rng.random() < 0.3:
            parts.insert(rng.randrange(len(parts) + 1), rng.choice(extra))
        yield "".join(rng.choice(SPACES) + part for part in parts)[rng.choice([0, 1, 1]) :]


def main():
    if transformers.__version__ != "5.23.0":
        sys.exit("transformers 5.23.0 is the reference")
    transformers.logging.set_verbosity_error()
    base = Tokenizer(models.BPE())
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rng = random.Random(3)
    corpus = [" ".join(rng.choices(WORDS, k=12)) for _ in range(400)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    base.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False))
    for name, files in FOLDERS.items():
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        base.model.save(str(folder))
        vocab = json.loads((folder / "vocab.json").read_text())
        (folder / "vocab.json").write_text(json.dumps(vocab | {END: len(vocab)}, ensure_ascii=False) + "\n")
        for file, content in files.items():
            (folder / file).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        source, lines = texts(), []
        while len(lines) < (200 if name != "family" else 20):
            text = next(source)
            ids = tokenizer(text)["input_ids"]
            line = dict(text=text, ids=ids, decoded=tokenizer.decode(ids, skip_special_tokens=True))
            lines.append(json.dumps(line, separators=(",", ":")))
        (folder / "lines.jsonl").write_text("\n".join(lines) + "\n")
        print(name, type(tokenizer).__name__, len(tokenizer))


if __name__ == "__main__":
    main()
