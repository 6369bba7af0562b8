#!/usr/bin/env python3
"""Makes the folder spm: SentencePiece models, and what AutoTokenizer of transformers 5.23.0 makes of them with sentencepiece 0.2.3.

    oracle/bin/python tests/tokenizers/spm.py            # the committed folder
    oracle/bin/python tests/tokenizers/spm.py --full DIR # 10,000 lines each, with sentencepiece's own nmt_nfkc as the character map

`cases.json` holds for each case the files of its checkpoint: the name of a model, or a JSON file's content. `CASE.jsonl` holds for each
text its `ids` with special tokens, these `decoded` without special tokens, and `src_lang` where it is not the checkpoint's.
"""

import io
import json
import os
import random
import shutil
import sys
import tempfile
import unicodedata
from pathlib import Path

import sentencepiece
import transformers
from transformers import AutoTokenizer
from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES as NLLB

HERE = Path(__file__).resolve().parent / "spm"

WORDS = (
    "the of and a to in he was it his that I with her had said time upon once there king lived little girl forest house water hello "
    "world translate summarize English German French number language model isn't you'll they've I'm DON'T 3.14159 1234567 2024-05-06 "
    "10,000 naïve café über Straße résumé le la les des est dans pour que der die und das nicht ist ein mit auf für el los una con "
    "мир Привет как дела хорошо сегодня он она 你好 世界 今天 天气 很好 我们 日本語 テスト です ます こんにちは 한국어 안녕하세요 세계 שלום עולם "
    "مرحبا بالعالم كتاب हिन्दी नमस्ते दुनिया สวัสดี ชาวโลก Xin chào thế giới Türkçe ığdır şehir γειά κόσμε ... !!! ?! -- ( ) [ ] { } : ; , . ' "
    '" & % $ # @ * + = / \\ | ~ ^ _ < >'
).split(" ")
HARD = [
    "ﬁ", "ﬂag", "ﬃ", "Ａ１", "ｶﾞｷﾞ", "①②", "½", "㎏", "㍿", "Ⅷ", "ǅ", "e\u0301te\u0301", "\u212b", "a\u030a\u0323", "q\u0307\u0323", "\u1100\u1161\u11a8",
    "🙂", "👩‍👩‍👧", "🇩🇪", "👍🏽", "☃\ufe0f", "1\ufe0f\u20e3", "𝔘𝔫𝔦", "𠮷", "\U000e0067", "\ue000", "\ufdd0", "\uffff", "\ufffd", "\U0010ffff",
    "\u200b", "\u200d", "\u200e", "\ufeff", "\u00ad", "\u2060", "\u061c", "\x00", "\x01", "\x1b[0m", "\x1c", "\x7f", "\x85", "\x9f",
    "a" * 40, "xyz" * 30, "日" * 30, "ﬁ" * 20, "▁", "▁▁", "a▁b", " ▁", "</s>", "<s>", "<unk>", "<pad>", "<mask>", "<mask_1>", "<unk_5>",
    "<extra_id_0>", "<extra_id_99>", "en_XX", "de_DE", "deu_Latn", "__fr__", ">>de<<", ">>", "<<", "<0x0A>", "<bos>", "<start_of_turn>", "<sep>",
    "@@", "<|end|>", "x</s>y", "</s></s>", " </s> ", "⁇", "𝒳", "ʼ", "İ", "ß", "ŉ", "ﷺ", "ﬀ\u0301", "\u0301", "\u0301\u0302\u0303\u0304\u0305",
]  # fmt: skip
SPACES = [" ", " ", " ", " ", " ", "  ", "   ", " " * 9, "\n", "\n\n", " \n ", "\t", "\r\n", "", "", "\u00a0", "\u3000", "\u2028", "\u2003", "\x0b"]


def texts(rng):
    yield from ["", " ", "   ", "\n", "a", " a", "a ", "  a  b  ", "</s>", "hello</s>", "</s> hello", ">>de<< hello world", ">>fr<<hello", ">>xx<< hi"]
    yield from HARD
    while True:
        parts = []
        for _ in range(rng.choice([1, 2, 3, 4, 6, 9])):
            kind = rng.random()
            if kind < 0.68:
                parts.append(rng.choice(WORDS))
            elif kind < 0.93:
                parts.append(rng.choice(HARD))
            else:
                code = rng.choice([rng.randrange(0x20), rng.randrange(0x250), rng.randrange(0x3000), rng.randrange(0xD800), rng.randrange(0xE000, 0x20000)])
                parts.append(chr(code))
        yield "".join(rng.choice(SPACES) + part for part in parts)[rng.choice([0, 1, 1]) :] + rng.choice(["", "", "", " ", "  ", "\n"])


def rules():
    """A character map in nmt_nfkc's manner, for a few characters."""
    codes = [*range(0xA0, 0x100), *range(0x132, 0x180), *range(0x2000, 0x2030), *range(0x2100, 0x2190), *range(0x2460, 0x2480), 0x3000]
    codes += [*range(0x3380, 0x33C0), 0x337F, *range(0xFB00, 0xFB07), *range(0xFF01, 0xFFA0), 0xFDFA, *range(0x1D518, 0x1D530)]
    table = {chr(code): unicodedata.normalize("NFKC", chr(code)) for code in codes}
    pairs = [base + mark for base in "aeioucnAEIOUｶｷ" for mark in "\u0300\u0301\u0302\u0308\u030a\u0327\uff9e"]
    table |= {pair: unicodedata.normalize("NFKC", pair) for pair in pairs}
    table |= {character: " " for character in "\t\n\r\x0b\x0c\u2028\u2029\u200b\u200e\u200f\ufeff\ufffd"} | {chr(code): "" for code in [*range(1, 9), *range(0xE, 0x20), 0x7F]}
    hexes = lambda text: " ".join(f"{ord(character):X}" for character in text)
    return "".join(f"{hexes(old)}\t{hexes(new)}\n" for old, new in sorted(table.items()) if old != new)


def train(folder, full):
    rng = random.Random(7)
    corpus = [" ".join(rng.choices(WORDS, k=rng.randint(4, 14))) for _ in range(3000)]
    (folder / "rules.tsv").write_text(rules())
    mapped = dict(normalization_rule_name="nmt_nfkc") if full else dict(normalization_rule_tsv=os.path.relpath(folder / "rules.tsv"))
    verbatim = dict(normalization_rule_name="identity", remove_extra_whitespaces=False)
    bytewise = verbatim | dict(model_type="bpe", vocab_size=700, byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True)
    symbols = ["<mask>", "<start_of_turn>", "<end_of_turn>", "\n", "\n\n", "▁▁", "▁▁▁", "\t"]
    t5 = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    gemma = dict(pad_id=0, eos_id=1, bos_id=2, unk_id=3, bos_piece="<bos>", eos_piece="<eos>")
    models = {
        "unigram": dict(model_type="unigram", vocab_size=500) | t5 | mapped,
        "verbatim": dict(model_type="unigram", vocab_size=400, user_defined_symbols=["<sep>", "@@"]) | verbatim,
        "bpe": dict(model_type="bpe", vocab_size=450) | mapped,
        "llama": bytewise,
        "gemma": bytewise | gemma | dict(add_dummy_prefix=False, user_defined_symbols=symbols),
        "bytes": dict(model_type="unigram", vocab_size=600, byte_fallback=True) | t5 | mapped,
    }
    for name, options in models.items():
        if name == "bytes" and not full:
            continue
        written = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus), model_writer=written, minloglevel=2, num_threads=1, character_coverage=0.995,
            hard_vocab_limit=False, **options,
        )  # fmt: skip
        (folder / f"{name}.model").write_bytes(written.getvalue())
    (folder / "rules.tsv").unlink()


def pieces(path):
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return [model.id_to_piece(index) for index in range(model.get_piece_size())]


def number(*groups):
    return {token: index for index, token in enumerate(dict.fromkeys(token for group in groups for token in group))}


def special(text, **flags):
    return dict(content=text, lstrip=False, normalized=False, rstrip=False, single_word=False, special=True) | flags


def cases(folder, full):
    """The files of each checkpoint, and those that the reference has besides."""
    unigram, verbatim, bpe = (pieces(folder / f"{name}.model")[3:] for name in ("unigram", "verbatim", "bpe"))
    ends, flags = dict(eos_token="</s>", unk_token="<unk>", pad_token="<pad>"), dict(add_bos_token=True, add_eos_token=False)
    llama = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>") | flags
    marian = {"source.spm": "unigram.model", "target.spm": "verbatim.model", "config.json": dict(model_type="marian")}
    nllb = {"sentencepiece.bpe.model": "bpe.model", "config.json": dict(model_type="m2m_100")}
    nllb_config = lambda **more: dict(tokenizer_class="NllbTokenizer") | more
    # Where the languages are in the weights; the reference needs to be told.
    size = len(bpe) + 4
    told = {str(size + index): special(code) for index, code in enumerate(NLLB)} | {str(size + len(NLLB)): special("<mask>", lstrip=True, normalized=True)}
    m2m = {"sentencepiece.bpe.model": "bpe.model", "vocab.json": number(["<s>", "<pad>", "</s>", "<unk>"], bpe), "config.json": dict(model_type="m2m_100")}
    from transformers.models.m2m_100.tokenization_m2m_100 import FAIRSEQ_LANGUAGE_CODES

    listed = {"special_tokens_map.json": dict(additional_special_tokens=[f"__{code}__" for code in FAIRSEQ_LANGUAGE_CODES["m2m100"]])}
    result = {
        "t5": ({"spiece.model": "unigram.model", "config.json": dict(model_type="t5")}, {}),
        "mt5": (
            {
                "spiece.model": "unigram.model", "config.json": dict(model_type="mt5"), "special_tokens_map.json": ends,
                "tokenizer_config.json": dict(tokenizer_class="T5Tokenizer", extra_ids=0, additional_special_tokens=None) | ends,
            },
            {},
        ),
        "mbart": ({"sentencepiece.bpe.model": "unigram.model", "config.json": dict(model_type="mbart")}, {}),
        "mbart50": (
            {
                "sentencepiece.bpe.model": "unigram.model", "config.json": dict(model_type="mbart"),
                "tokenizer_config.json": dict(tokenizer_class="MBart50Tokenizer", src_lang="de_DE", tgt_lang=None),
            },
            {},
        ),
        "nllb": (nllb | {"tokenizer_config.json": nllb_config()}, {"tokenizer_config.json": nllb_config(added_tokens_decoder=told)}),
        "nllb-legacy": (
            nllb | {"tokenizer_config.json": nllb_config(legacy_behaviour=True, src_lang="deu_Latn")},
            {"tokenizer_config.json": nllb_config(legacy_behaviour=True, src_lang="deu_Latn", added_tokens_decoder=told)},
        ),
        "m2m100": (m2m | {"tokenizer_config.json": dict(tokenizer_class="M2M100Tokenizer", src_lang="fr")} | listed, {}),
        "pegasus": ({"spiece.model": "unigram.model", "config.json": dict(model_type="pegasus")}, {}),
        "marian": (marian | {"vocab.json": number(["</s>", "<unk>", ">>de<<", ">>fr<<"], unigram, verbatim, ["<pad>"])}, {}),
        "marian-separate": (
            marian
            | {
                "vocab.json": number(["</s>", "<unk>", "<pad>"], unigram), "target_vocab.json": number(["</s>", "<unk>", "<pad>"], reversed(verbatim)),
                "tokenizer_config.json": dict(tokenizer_class="MarianTokenizer", separate_vocabs=True, source_lang="en", target_lang="de"),
            },
            {},
        ),
        "llama": (
            {"tokenizer.model": "llama.model", "config.json": dict(model_type="llama"), "tokenizer_config.json": dict(tokenizer_class="LlamaTokenizer", legacy=False) | llama},
            {},
        ),
        "llama-legacy": (
            {"tokenizer.model": "llama.model", "config.json": dict(model_type="llama"), "tokenizer_config.json": dict(tokenizer_class="LlamaTokenizerFast", legacy=True) | llama},
            {},
        ),
        "mistral": ({"tokenizer.model": "llama.model", "config.json": dict(model_type="mistral"), "tokenizer_config.json": dict(tokenizer_class="LlamaTokenizer") | llama}, {}),
        "phi3": (
            {
                "tokenizer.model": "llama.model", "config.json": dict(model_type="phi3"),
                "tokenizer_config.json": dict(
                    tokenizer_class="LlamaTokenizer", add_bos_token=False, bos_token="<s>", eos_token="<|end|>", unk_token="<unk>",
                    added_tokens_decoder={"2": special("</s>", rstrip=True, special=False), "700": special("<|end|>", rstrip=True)},
                ),
            },
            {},
        ),
        "gemma": ({"tokenizer.model": "gemma.model", "config.json": dict(model_type="gemma"), "tokenizer_config.json": dict(tokenizer_class="GemmaTokenizer") | flags}, {}),
    }  # fmt: skip
    if full:
        result |= {
            "umt5": ({"spiece.model": "bytes.model", "config.json": dict(model_type="t5")}, {}),
            "plain-unigram": ({"tokenizer.model": "bytes.model", "config.json": dict(model_type="llama")}, {}),
            "llama-bare": ({"tokenizer.model": "llama.model", "config.json": dict(model_type="llama")}, {}),
            "llama-without-prefix": (
                {"tokenizer.model": "llama.model", "config.json": dict(model_type="llama"), "tokenizer_config.json": dict(tokenizer_class="LlamaTokenizer", add_prefix_space=False) | llama},
                {},
            ),
            "marian-bytes": (
                {
                    "source.spm": "bytes.model", "target.spm": "llama.model", "config.json": dict(model_type="marian"),
                    "vocab.json": number(["</s>", "<unk>"], pieces(folder / "bytes.model")[3:], pieces(folder / "llama.model")[3:], ["<pad>"]),
                },
                {},
            ),
            "marian-verbatim": (
                {
                    "source.spm": "verbatim.model", "target.spm": "verbatim.model", "config.json": dict(model_type="marian"),
                    "vocab.json": number(["</s>", "<unk>"], verbatim, ["<pad>"]),
                },
                {},
            ),
            "marian-gemma": (
                {
                    "source.spm": "gemma.model", "target.spm": "gemma.model", "config.json": dict(model_type="marian"),
                    "vocab.json": number(["</s>", "<unk>"], pieces(folder / "gemma.model"), ["<pad>"]),
                },
                {},
            ),
            "m2m100-verbatim": (
                {
                    "sentencepiece.bpe.model": "llama.model", "config.json": dict(model_type="m2m_100"),
                    "vocab.json": number(["<s>", "<pad>", "</s>", "<unk>"], pieces(folder / "llama.model")[3:]),
                }
                | listed,
                {},
            ),
        }  # fmt: skip
    return result


def write(folder, files, models):
    for name, content in files.items():
        if isinstance(content, str):
            shutil.copy(models / content, folder / name)
        else:
            (folder / name).write_text(json.dumps(content, ensure_ascii=False))


def main():
    if transformers.__version__ != "5.23.0" or sentencepiece.__version__ != "0.2.3":
        sys.exit("transformers 5.23.0 and sentencepiece 0.2.3 are the reference")
    transformers.logging.set_verbosity_error()
    full = "--full" in sys.argv
    folder = Path(sys.argv[sys.argv.index("--full") + 1]) if full else HERE
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    train(folder, full)
    everything = cases(folder, full)
    (folder / "cases.json").write_text(json.dumps({name: files for name, (files, _) in everything.items()}, ensure_ascii=False, separators=(",", ":")) + "\n")
    for index, (name, (files, more)) in enumerate(everything.items()):
        with tempfile.TemporaryDirectory() as checkpoint:
            write(Path(checkpoint), files | more, folder)
            tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        own = getattr(tokenizer, "src_lang", None)
        others = {"mbart": "ro_RO", "mbart50": "fr_XX", "nllb": "zho_Hans", "nllb-legacy": "fra_Latn", "m2m100": "de"}
        rng = random.Random(0 if full else index)
        source, lines = texts(rng), []
        if not full:
            # Each case has some of the fixed texts, and further ones of its own.
            fixed = [next(source) for _ in range(14 + len(HARD))]
            source = iter(fixed[:14] + fixed[14 + index % 3 :: 3] + [next(source) for _ in range(80)])
        for text in source:
            line = dict(text=text)
            if name in others and rng.random() < 0.2:
                line["src_lang"] = tokenizer.src_lang = others[name]
            line["ids"] = tokenizer(text)["input_ids"]
            if own and "src_lang" in line:
                tokenizer.src_lang = own
            line["decoded"] = tokenizer.decode(line["ids"], skip_special_tokens=True)
            if name == "marian-separate":
                # What is read is not what is written.
                line["target"] = tokenizer(text_target=text)["input_ids"]
                line["decoded"] = tokenizer.decode(line["target"], skip_special_tokens=True)
            lines.append(json.dumps(line, ensure_ascii=False, separators=(",", ":")))
            if len(lines) == 10_000:
                break
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        print(name, type(tokenizer).__name__, len(tokenizer), len(lines))


if __name__ == "__main__":
    main()
